"""The trained model outside the repository, without and with this package.

A Python that cannot import `spar` answers from the exported InternVL folder as `SparPipeline.answer` does, and the
exported pipeline draws and edits the same pixels. tests/test_export.py does the same on a small random model.

    python tools/exported.py [--model artifacts/mini/pipeline] [--scenes 8]      after `make repro`
"""
import argparse
import sys
import tempfile
from pathlib import Path
import numpy as np
from PIL import Image
from spar.pipeline import SparPipeline
from spar.scale.export import export
from spar.world.questions import questions
from spar.world.scenes import render, scene

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'tests'))
import test_export as T


def asked(pipe: SparPipeline, folder: Path, scenes: int, home: Path) -> tuple:
    "Questions about test scenes: how many, how many answered alike without `spar`, largest difference of a logit."
    n = same = 0
    most = 0.
    for k in range(scenes):
        s, photo = scene(0, 'test', k), home/f'{k}.png'
        Image.fromarray(np.asarray(render(s))).save(photo)
        T.QUESTIONS = [q.text for q in questions(s, 0, k)]
        theirs, logits = T.stranger(folder, photo, home/'logits.pt')
        ours = [pipe.answer(photo, q) for q in T.QUESTIONS]
        n += len(ours)
        same += sum(a == b for a, b in zip(ours, theirs['answers']))
        most = max(most, (logits - T.our_logits(pipe, photo)).abs().max().item())
    return n, same, most


def drawn(pipe: SparPipeline, photo: Path) -> list:
    "A picture from a prompt, and an edit of a photo."
    image = pipe('a red star left of a blue heart', seed=3).images[0]
    edited = pipe.edit(Image.open(photo), 'make the background black', seed=3).images[0]
    return [np.asarray(image), np.asarray(edited)]


def main(model: str, scenes: int, home: Path) -> bool:
    pipe = SparPipeline.from_pretrained(model)
    n, same, most = asked(pipe, export(pipe, 'internvl', home/'internvl'), scenes, home)
    print(f'{same} of {n} answers the same without spar, largest difference of a logit {most:.1e}')
    again = SparPipeline.from_pretrained(export(pipe, 'pipeline', home/'pipeline'))
    alike = [np.array_equal(a, b) for a, b in zip(drawn(pipe, home/'0.png'), drawn(again, home/'0.png'))]
    print(f'same pixels from the exported pipeline: drawn {alike[0]}, edited {alike[1]}')
    return same == n and most < 1e-3 and all(alike)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--model', default='artifacts/mini/pipeline')
    p.add_argument('--scenes', type=int, default=8)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as d:
        sys.exit(not main(args.model, args.scenes, Path(d)))
