"""The build backend: setuptools', with editable installs that also work in the folder above a checkout.

Python asks setuptools' finder of an editable install after sys.path. In the folder above a checkout named fastvae,
sys.path already gives that name: the checkout's root, an empty namespace package. The lines of a .pth file become
entries of sys.path itself, where a package goes before a namespace package of an earlier entry.
"""

import base64
import hashlib
import zipfile
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 (the other hooks)

CHECKOUT = Path(__file__).resolve().parent
PATHS = "fastvae_latents.pth"


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """Build setuptools' editable wheel, add a .pth file with both source roots, and return the wheel's name."""
    name = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    path = Path(wheel_directory, name)
    with zipfile.ZipFile(path) as wheel:
        files = {member: wheel.read(member) for member in wheel.namelist()}
    files[PATHS] = f"{CHECKOUT}\n{CHECKOUT / 'kernels'}\n".encode()
    digest = base64.urlsafe_b64encode(hashlib.sha256(files[PATHS]).digest()).rstrip(b"=").decode()
    record = next(member for member in files if member.endswith(".dist-info/RECORD"))
    files[record] += f"{PATHS},sha256={digest},{len(files[PATHS])}\n".encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for member, content in files.items():
            wheel.writestr(member, content)
    return name
