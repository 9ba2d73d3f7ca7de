"""What a test host has in the place of uv: its environments are links to the one that the tests run in.

Nothing is downloaded. `pip install` is checked instead: what is asked for must be there, at the versions asked for.
"""

import re
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

SCRIPT = "#!{python}\nfrom ray.scripts.scripts import main\nmain()\n"


def make_environment(folder: Path) -> None:
    """`uv venv`: an environment in which the packages of this one can be imported, and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages_of(folder) / "image.pth").write_text(sysconfig.get_path("purelib") + "\n")


def packages_of(environment: Path) -> Path:
    return environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def install(environment: Path, requirements: list[str], *, project: Path, extras: set[str]) -> None:
    """`uv pip install`: the project by its path, the rest by being there already."""
    described = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    requirements += described["dependencies"]
    for extra in extras:
        requirements += described["optional-dependencies"][extra]
    missing = [text for text in requirements if not is_there(Requirement(text))]
    if missing:
        sys.exit(f"error: the image has not {', '.join(missing)}")
    (packages_of(environment) / "project.pth").write_text(f"{project}\n")
    ray = environment / "bin" / "ray"
    ray.write_text(SCRIPT.format(python=environment / "bin" / "python"))
    ray.chmod(0o755)


def is_there(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


def main(arguments: list[str]) -> None:
    match arguments:
        case ["venv", "--managed-python", "--python", wanted, folder]:
            if wanted.split(".")[:2] != [str(part) for part in sys.version_info[:2]]:
                sys.exit(f"error: the image has Python {sys.version.split()[0]}, not {wanted}")
            make_environment(Path(folder))
        case ["pip", "install", "--python", python, "-c", constraints, *requirements, "-e", project]:
            folder, extras = re.fullmatch(r"([^\[]*)(?:\[(.*)\])?", project).groups()
            if not Path(constraints).is_file():
                sys.exit(f"error: no file {constraints}")
            install(
                Path(python).parent.parent,
                requirements,
                project=Path(folder).resolve(),
                extras=set(filter(None, (extras or "").split(","))),
            )
        case _:
            sys.exit(f"error: the stand-in for uv knows no {arguments}")


main(sys.argv[1:])
