"""Parameter counts of the full-size modules, without their memory."""
import torch
from spar.core import n_params
from spar.unified.routing import Routing, RoutingConfig
from spar.tokenizer.streams import DualStream, StreamsConfig

def millions(module, digits): return round(n_params(module) / 1e6, digits)

def test_dual_streams_of_the_paper():
    with torch.device('meta'):
        assert millions(DualStream(StreamsConfig(D_s=896, D_p=32)), 1) == 67.6
        assert millions(DualStream(StreamsConfig(D_s=1536, D_p=32)), 1) == 198.5

def test_routing_of_the_paper():
    with torch.device('meta'):
        assert millions(Routing(896, RoutingConfig(init='plain')), 2) == 1.21
        assert millions(Routing(1536, RoutingConfig(init='plain')), 2) == 3.55
