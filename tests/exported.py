"""The trained model outside the repository: a Python that cannot import `spar` answers from the exported InternVL folder as `SparPipeline.answer` does, and the exported pipeline draws and edits the same pixels.

    python tests/exported.py [--model artifacts/mini/pipeline] [--scenes 8]      after `make repro`; the same on a small random model is in tests/test_export.py"""
import argparse, sys, tempfile
from pathlib import Path
import numpy as np
from PIL import Image
import test_export as T
from spar.scale.export import export
from spar.pipeline import SparPipeline
from spar.world.questions import questions
from spar.world.scenes import render, scene

def main(model: str, scenes: int, place: Path) -> bool:
    pipe = SparPipeline.from_pretrained(model); folder, again = export(pipe, 'internvl', place/'internvl'), SparPipeline.from_pretrained(export(pipe, 'pipeline', place/'pipeline'))
    asked = same = 0; most = 0.
    for k in range(scenes):
        s, photo = scene(0, 'test', k), place/f'{k}.png'; Image.fromarray(np.asarray(render(s))).save(photo)
        T.QUESTIONS = [q.text for q in questions(s, 0, k)]; told, logits = T.stranger(folder, photo, place/'logits.pt')
        ours = [pipe.answer(photo, q) for q in T.QUESTIONS]; asked += len(ours); same += sum(a == b for a, b in zip(ours, told['answers']))
        most = max(most, (logits - T.our_logits(pipe, photo)).abs().max().item())
    print(f'{same} of {asked} answers the same without spar, largest difference of a logit {most:.1e}')
    pixels = [[np.asarray(x) for x in (p('a red star left of a blue heart', seed=3).images[0], p.edit(Image.open(place/'0.png'), 'make the background black', seed=3).images[0])] for p in (pipe, again)]
    alike = [np.array_equal(a, b) for a, b in zip(*pixels)]; print(f'same pixels from the exported pipeline: drawn {alike[0]}, edited {alike[1]}')
    return same == asked and most < 1e-3 and all(alike)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0]); p.add_argument('--model', default='artifacts/mini/pipeline'); p.add_argument('--scenes', type=int, default=8); a = p.parse_args()
    with tempfile.TemporaryDirectory() as d: sys.exit(not main(a.model, a.scenes, Path(d)))
