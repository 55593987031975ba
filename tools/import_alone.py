"""Import modules of the package, each in a process of its own, optionally with only the minimal libraries.

Use: python tools/import_alone.py [--minimal] MODULE ...    prints the failures as JSON, {module: error}
A process imports the libraries shared by all once; each module is then imported in a fork of it.
"""
import importlib
import json
import os
import re
import sys
from importlib import metadata

SHARED = ("torch", "numpy", "einops", "sentencepiece", "safetensors.torch", "tqdm.auto", "filelock")


def plain(name: str) -> str:
    "A distribution's name in the spelling that all spellings share."
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(roots: set[str]) -> set[str]:
    "The distributions that `roots` need, extras left out, themselves included."
    seen, todo = set(), [plain(r) for r in roots]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            wanted = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        todo += [plain(re.match(r"[\w.-]+", w)[0]) for w in wanted if "extra ==" not in w]
    return seen


class Block:
    "An import hook that refuses every installed package which the minimal set does not bring."

    def __init__(self, allowed: set[str]):
        owners = metadata.packages_distributions()
        self.refused = {top for top, dists in owners.items() if not {plain(d) for d in dists} & allowed}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.refused:
            raise ModuleNotFoundError(f"{name} is not in the minimal set", name=name)


def import_in_fork(name: str) -> str:
    "Import a module in a child process; what went wrong, or an empty string."
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = ""
        try:
            importlib.import_module(name)
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said[:1000].encode())
        os._exit(0)
    os.close(writer)
    said = os.read(reader, 4000).decode(errors="replace")
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    return said or (f"exit status {status}" if status else "")


def main(args: list[str]) -> None:
    "Import the named modules and print the failures."
    if "--minimal" in args:
        roots = {name.partition(".")[0] for name in SHARED}
        sys.meta_path.insert(0, Block(closure(roots) | {"setuptools", "llama2-nbdev"}))
    for name in SHARED:
        importlib.import_module(name)
    errors = {name: import_in_fork(name) for name in args if not name.startswith("--")}
    print(json.dumps({name: error for name, error in errors.items() if error}))


if __name__ == "__main__":
    main(sys.argv[1:])
