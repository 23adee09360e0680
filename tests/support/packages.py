"""Small packages in the form of the registries, and the samples of a prepared folder, read with tarfile alone."""

import io
import json
import subprocess
import tarfile
from pathlib import Path

from moe_dist.corpora.packages import npm_archive


def npm_package(package: str, downloads: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(npm_archive(package, downloads), "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def debian_package(name: str, folder: Path, downloads: Path) -> None:
    control = folder / "DEBIAN" / "control"
    control.parent.mkdir(parents=True)
    control.write_text(f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: test\n")
    subprocess.run(["dpkg-deb", "--build", folder, downloads / f"{name}_1_all.deb"], check=True, capture_output=True)


def metas(folder: Path) -> dict[str, tuple[str, dict]]:
    """Return key -> split and .json member of every sample, read with tarfile alone."""
    found = {}
    for tar_path in folder.rglob("*.tar"):
        with tarfile.open(tar_path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    key = member.name.removesuffix(".json")
                    assert key not in found
                    found[key] = (tar_path.parent.name, json.load(tar.extractfile(member)))
    return found
