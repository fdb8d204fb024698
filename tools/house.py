"""How the repository is built, in numbers: rooms, the direction of their imports, and the sizes that a reader meets.

    python tools/house.py           print the table
    python tools/house.py --arrows  also every import from one room into another

A room is a folder of the package, or a module that lies beside the folders. `ROOMS` is the one place where their order
is written down: a module imports from its own room and from rooms before it, never from one after it.
AST nodes a line: every node of Python's syntax tree except load and store contexts, counted on the line it begins on,
over all lines that begin any.
"""
import argparse
import ast
import json
import re
import subprocess
from collections import Counter, defaultdict
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
ROOMS = [
    'core', 'machine', 'images', 'figures', 'backbones', 'world', 'training', 'tokenizer', 'unified', 'evaluation',
    'mini', 'using', 'pipeline', 'running', 'cli', 'scale',
]
LIMITS = {
    'imports that point up': 0, 'circles between modules': 0, 'lines of the longest module': 400,
    'lines of an exported cell, p90': 20, 'lines of an exported cell, max': 40, 'widest line': 120,
    'AST nodes a line, p90': 20, 'names exported twice': 0, 'statements that share a line': 0, 'lines of dvc.yaml': 170,
}


def modules(root=ROOT) -> dict:
    "Name -> path of every module that a notebook exports; `spar.` is left out of the names."
    paths = [p for p in sorted((root / 'spar').rglob('*.py')) if p.name not in ('__init__.py', '_modidx.py')]
    return {'.'.join(p.relative_to(root / 'spar').with_suffix('').parts): p for p in paths}


def imports(name: str, path: Path, known) -> set:
    "The modules that one module imports, anywhere in it."
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            full = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ['spar', *name.split('.')][: -node.level] if node.level else []
            base = '.'.join(above + ([node.module] if node.module else []))
            full = [base, *(f'{base}.{a.name}' for a in node.names)]
        else:
            continue
        found |= {f[len('spar.'):] for f in full if f.startswith('spar.')} & known.keys()
    return found - {name}


def room(name: str) -> str:
    return name.split('.')[0]


def circles(graph: dict) -> list:
    "Sets of modules that import each other, directly or through others."
    def reach(start):
        seen, todo = set(), [start]
        while todo:
            for m in graph[todo.pop()] - seen:
                seen.add(m)
                todo.append(m)
        return seen
    far = {m: reach(m) for m in graph}
    return sorted({tuple(sorted(n for n in far[m] if m in far[n])) for m in graph if m in far[m]})


def cells(root=ROOT) -> list:
    "(notebook, source) of every exported cell that defines something."
    out = []
    for p in sorted((root / 'nbs').rglob('*.ipynb')):
        if '.ipynb_checkpoints' in p.parts:
            continue
        for c in json.loads(p.read_text())['cells']:
            source = ''.join(c['source'])
            if c['cell_type'] == 'code' and re.search(r'^#\|\s*exports?\b', source, re.M):
                out.append((p.relative_to(root), source))
    return out


def lines_of(source: str) -> list:
    "The lines of a cell that a reader reads: no directives, no blank lines at its ends."
    return '\n'.join(x for x in source.splitlines() if not x.startswith('#|')).strip('\n').splitlines()


def imports_only(source: str) -> bool:
    return all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(source).body)


def nodes_a_line(source: str) -> list:
    count = Counter()

    def walk(node, line):
        line = getattr(node, 'lineno', line)
        if line and not isinstance(node, ast.expr_context):
            count[line] += 1
        for child in ast.iter_child_nodes(node):
            walk(child, line)
    walk(ast.parse(source), None)
    return list(count.values())


def crowded(source: str) -> int:
    "Lines on which a second statement begins; the one-line body of `if x: return y` does not count."
    starts, bodies = defaultdict(int), set()
    for node in ast.walk(ast.parse(source)):
        for field in ('body', 'orelse', 'finalbody'):
            block = getattr(node, field, None)
            if isinstance(block, list):
                for s in block:
                    starts[s.lineno] += 1
                if len(block) == 1 and block[0].lineno == getattr(node, 'lineno', 0):
                    bodies.add(block[0].lineno)
    return sum(n > 1 + (line in bodies) for line, n in starts.items())


def percentile(values, q) -> float:
    "Nearest rank: the smallest value that at least q of the values do not exceed."
    values = sorted(values)
    return values[max(0, -(-len(values) * q // 100) - 1)]


def exported_twice(root=ROOT) -> dict:
    "Public name -> modules, for names that more than one module exports."
    where = defaultdict(list)
    for name, path in modules(root).items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == '__all__':
                for public in ast.literal_eval(node.value):
                    where[public].append(name)
    return {k: v for k, v in where.items() if len(v) > 1}


def columns_of_metrics(root=ROOT):
    "Width of `dvc metrics show`, or None where DVC or the metrics are missing."
    try:
        shown = subprocess.run(['dvc', 'metrics', 'show'], cwd=root, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return max(map(len, shown.stdout.splitlines()), default=None) if shown.returncode == 0 else None


def measure(root=ROOT, dvc: bool = True) -> dict:
    "Every number of the table."
    known = modules(root)
    graph = {name: imports(name, path, known) for name, path in known.items()}
    rank = {r: i for i, r in enumerate(ROOMS)}
    across = {(a, b) for a, bs in graph.items() for b in bs if room(a) != room(b)}
    placed = {room(m) for m in known} <= rank.keys()      # another checkout may know other rooms
    code = cells(root)
    sizes = [len(lines_of(s)) for _, s in code if not imports_only(s)]
    sources = [p.read_text() for p in known.values()]
    texts = [s.split('# %%', 2)[-1] for s in sources]      # without __all__, which nbdev lays out
    return {
        'rooms': len({room(m) for m in known}),
        'modules': len(known),
        'arrows between rooms': len({(room(a), room(b)) for a, b in across}),
        'imports that point up': sum(rank[room(b)] > rank[room(a)] for a, b in across) if placed else 'no order',
        'circles between modules': len(circles(graph)),
        'lines of the longest module': max(len(s.splitlines()) for s in sources),
        'exported cells': len(sizes),
        'lines of an exported cell, p90': percentile(sizes, 90),
        'lines of an exported cell, max': max(sizes),
        'widest line': max(len(x) for t in texts for x in t.splitlines()),
        'statements that share a line': sum(map(crowded, sources)),
        'AST nodes a line, p90': percentile([n for s in sources for n in nodes_a_line(s)], 90),
        'names exported twice': len(exported_twice(root)),
        'lines of dvc.yaml': len((root / 'dvc.yaml').read_text().splitlines()),
        'stages in dvc.yaml': len(yaml.safe_load((root / 'dvc.yaml').read_text())['stages']),
    } | ({'columns of `dvc metrics show`': columns_of_metrics(root)} if dvc else {})


def details(root=ROOT) -> list:
    "What stands behind the numbers that are over their limit, one line each."
    known = modules(root)
    graph = {name: imports(name, path, known) for name, path in known.items()}
    rank = {r: i for i, r in enumerate(ROOMS)}
    out = [f'up: {a} -> {b}' for a in graph for b in sorted(graph[a]) if rank[room(b)] > rank[room(a)]]
    out += ['circle: ' + ' '.join(c) for c in circles(graph)]
    out += [f'twice: {n} in {", ".join(ms)}' for n, ms in sorted(exported_twice(root).items())]
    for path, source in cells(root):
        n = len(lines_of(source))
        if n > LIMITS['lines of an exported cell, max']:
            out.append(f'long cell: {path}, {n} lines: {lines_of(source)[0][:60]}')
    for name, path in known.items():
        for i, line in enumerate(path.read_text().splitlines(), 1):
            if len(line) > 120 and not line.startswith('# %%'):
                out.append(f'wide: spar/{name.replace(".", "/")}.py:{i}, {len(line)} columns')
        if crowded(path.read_text()):
            out.append(f'statements that share a line: spar/{name.replace(".", "/")}.py')
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--root', type=Path, default=ROOT, help='another checkout')
    p.add_argument('--arrows', action='store_true', help='every room and what it imports')
    p.add_argument('--details', action='store_true', help='what stands behind the numbers over their limit')
    args = p.parse_args()
    for key, value in measure(args.root).items():
        limit = f'  (limit {LIMITS[key]})' if key in LIMITS else ''
        print(f'{key:34} {value}{limit}')
    known = modules(args.root)
    if args.arrows:
        inside = defaultdict(set)
        for name, path in known.items():
            inside[room(name)] |= {room(m) for m in imports(name, path, known)} - {room(name)}
        for r in ROOMS:
            print(f'{r:12} -> {" ".join(sorted(inside[r], key=ROOMS.index))}')
    if args.details:
        print('\n'.join(details(args.root)))


if __name__ == '__main__':
    main()
