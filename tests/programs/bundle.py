"""Python packages for a guest that has no network: `bundle.py REQUIREMENTS PACKAGE... > bundle.tar.gz`.

pip fetches exactly what the list names (each file has its hash there). What is plain Python goes into one zip file, byte
code in it, which Python imports from as it is: in a guest that is emulated thousands of files cost minutes. Packages
with machine code, and those named here (they look for files beside themselves), stay folders.
"""

import gzip
import importlib.util
import io
import os
import py_compile
import subprocess
import sys
import tarfile
import tempfile
import zipfile

# What the guest has (docs/images.md: bookworm).
VERSION = "3.11"
PLATFORMS = ["manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_28_x86_64"]
# Never imported there.
LEFT_OUT = ("bin", "__pycache__")


def install(requirements, target):
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--no-compile",
         "--only-binary", ":all:", "--implementation", "cp", "--python-version", VERSION, *platforms,
         "--target", target, "--requirement", requirements],
        check=True, stdout=sys.stderr)


def files(top):
    for folder, folders, names in os.walk(top):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(names):
            yield os.path.join(folder, name)


def compiled(path, name):
    """A source's byte code; None: this Python is another than the guest's."""
    if sys.version_info[:2] != tuple(int(part) for part in VERSION.split(".")):
        return None
    try:
        with tempfile.TemporaryDirectory() as scratch:
            out = os.path.join(scratch, "out")
            mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
            py_compile.compile(path, out, name, doraise=True, invalidation_mode=mode)
            with open(out, "rb") as file:
                return file.read()
    except py_compile.PyCompileError:
        # A template, or for another Python: nobody imports it.
        return None


def read(path):
    with open(path, "rb") as file:
        return file.read()


def main():
    requirements, *as_folders = sys.argv[1:]
    with tempfile.TemporaryDirectory() as target:
        install(requirements, target)
        buffer = io.BytesIO()
        with gzip.GzipFile(fileobj=sys.stdout.buffer, mode="wb", compresslevel=6, mtime=0) as stream, \
                tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar, \
                zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as pure:
            def add(name, data):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                entry.mode = 0o755 if name.endswith(".so") else 0o644
                tar.addfile(entry, io.BytesIO(data))

            for top in sorted(os.listdir(target)):
                if top in LEFT_OUT:
                    continue
                path = os.path.join(target, top)
                inside = list(files(path)) if os.path.isdir(path) else [path]
                stays = top in as_folders or any(".so" in os.path.basename(name) for name in inside)
                folders = set()
                for file in inside:
                    name = os.path.relpath(file, target)
                    data = read(file)
                    code = compiled(file, name) if name.endswith(".py") else None
                    if stays:
                        add("folders/" + name, data)
                        if code:
                            add("folders/" + importlib.util.cache_from_source(name), code)
                        continue
                    # A package without __init__ is found by its folder's entry.
                    folder = os.path.dirname(name)
                    while folder and folder not in folders:
                        folders.add(folder)
                        pure.writestr(folder + "/", b"")
                        folder = os.path.dirname(folder)
                    pure.writestr(name + "c", code) if code else pure.writestr(name, data)
            pure.close()
            add("pure.zip", buffer.getvalue())


if __name__ == "__main__":
    main()
