"""Runs the notebooks of this folder and writes their outputs into them.

`python examples/execute.py [NAME ...]`, all when none is named; needs the extra `notebooks`. Runs
in a scratch folder, with the package of this checkout and without a network: what was published is
out of reach, also where it was downloaded before. The same code gives the same file on one machine.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
_CELL_SECONDS = 900


class OwnKernel(AsyncKernelManager):
    """This interpreter's kernel, whatever kernels of that name the user has."""

    def _kernel_spec_manager_default(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])


def read(file: Path) -> NotebookNode:
    return nbformat.read(file, as_version=4)


def execute(notebook: NotebookNode) -> NotebookNode:
    """Gives the notebook back with the outputs of this run; an error in a cell is raised."""
    with tempfile.TemporaryDirectory() as scratch:
        environment = {
            **os.environ,
            "HF_HOME": scratch,
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "IPYTHONDIR": scratch,
            "PYTHONPATH": str(FOLDER.parent),
            "PYTHONWARNINGS": "ignore:IProgress",  # of tqdm, where there are no widgets
        }
        environment.pop("MPLBACKEND", None)  # the kernel's own draws into the notebook
        client = NotebookClient(
            notebook,
            kernel_manager_class=OwnKernel,
            timeout=_CELL_SECONDS,
            record_timing=False,
            coalesce_streams=True,
            extra_arguments=["--log-level=ERROR"],  # it warns of talking to this machine itself
            resources={"metadata": {"path": scratch}},
        )
        client.execute(env=environment)
    notebook.metadata = NotebookNode(METADATA)  # the kernel adds its version
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    names = [file.stem for file in NOTEBOOKS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    arguments = parser.parse_args()
    if unknown := {*arguments.names} - {*names}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    for file in NOTEBOOKS:
        if file.stem in (arguments.names or names):
            print(file.name, flush=True)
            content = nbformat.writes(execute(read(file)))
            file.write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
