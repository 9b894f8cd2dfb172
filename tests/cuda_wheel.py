"""Read of torch's CUDA wheel, that pip finds, only what a build needs: some 10 MB of its 900.

`python cuda_wheel.py VERSION FOLDER` unpacks the headers and `cpp_extension` into FOLDER. The exit
status is 3, with a sentence, where the wheel cannot be had.
"""

import sys
import zipfile

from pip._internal.commands import create_command
from pip._internal.exceptions import PipError
from pip._internal.network.lazy_wheel import HTTPRangeRequestUnsupported, LazyZipOverHTTP
from pip._vendor.packaging.specifiers import SpecifierSet
from pip._vendor.requests import RequestException

PIECES = ("torch/include/torch/", "torch/version.py", "torch/utils/cpp_extension.py")


def unpack(version: str, folder: str) -> str | None:
    """Return what is missing, None if nothing is."""
    command = create_command("download")
    with command.main_context():
        options, _ = command.parse_args(["--retries", "1"])
        session = command.get_default_session(options)
        finder = command._build_package_finder(options, session)
        # "===" takes the release itself, where "==" also takes its build for the CPU, "+cpu".
        found = finder.find_best_candidate("torch", SpecifierSet(f"==={version}")).best_candidate
        if found is None:
            return f"pip finds no wheel of torch {version} for this Python"
        link = found.link
        file = link.file_path if link.is_file else LazyZipOverHTTP(link.url, session, 1 << 20)
        with zipfile.ZipFile(file) as wheel:
            members = [m for m in wheel.infolist() if m.filename.startswith(PIECES)]
            if not link.is_file:  # the headers lie side by side: fetch them in one go
                headers = [m for m in members if m.filename.startswith(PIECES[0])]
                file.seek(min(m.header_offset for m in headers))
                file.read(sum(m.compress_size + 2 * len(m.filename) + 64 for m in headers))
            wheel.extractall(folder, members)
    return None


if __name__ == "__main__":
    try:
        fault = unpack(*sys.argv[1:])
    except (PipError, RequestException, HTTPRangeRequestUnsupported, OSError) as error:
        fault = f"the wheel of torch {sys.argv[1]} cannot be read ({error!r:.300})"
    if fault:
        print(fault)
        raise SystemExit(3)
