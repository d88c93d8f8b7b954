#!/usr/bin/env python3
"""Fails on a test that every run skipped for a reason that is not listed here.

    .ci/skips.py [--without NAME ...] REPORT.xml ...

Reports are pytest's JUnit XML. A test that one run skips and another passes is not skipped. `--without` names
what could not be installed on this machine.
"""

import argparse
import re
import sys
from xml.etree import ElementTree

LISTED = {
    r"needs (the [\w ]+ in )?\.\./shared|the parity fixtures are not here": "not ours to publish",
    r"needs (a GPU|two GPUs)": "runners have none; benchmarks/gpu.sh correct runs them",
    r"a tile of one frame is proven on the shorter inputs": "would take minutes and show nothing new",
    r"no zsh": "bash is asked everywhere; zsh where it is installed",
    r"root reads everything": "means something to other users only; continuous integration has both kinds",
    r"needs root, to become another user": "as above",
    r"needs setpriv, or another user than root": "as above",
    r"elsewhere names are Unicode|this file system takes UTF-8 only": "of Linux and its file systems",
    r"clients before 1\.0 behave otherwise here": "with the lowest huggingface_hub",
}
MISSING = {
    "ffmpeg": r"needs ffmpeg",
    "chromium": r"needs a Chromium",
    "codecs": r"could not import '(transformers|diffusers|agc)'",
    "triton": r"could not import 'triton'",
    "neighbours": r"could not import '(diffusers|transformers|onnx|onnxruntime|onnxscript)'",
    "stable-audio-tools": r"could not import 'stable_audio_tools",
    "datasets": r"could not import '(pyarrow|webdataset|datasets)",
    "docs": r"could not import '(nbconvert|zensical)'",
    "ray": r"could not import 'ray'",
}


def main() -> int:
    """Prints what is skipped and why; 1 where a reason is not listed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--without", action="append", default=[], choices=sorted(MISSING))
    parser.add_argument("reports", nargs="+")
    arguments = parser.parse_args()
    passed: set[str] = set()
    modules: set[str] = set()
    skipped: dict[str, str] = {}
    for report in arguments.reports:
        for case in ElementTree.parse(report).iter("testcase"):
            name = f"{case.get('classname')}::{case.get('name')}"
            found = case.find("skipped")
            if found is None:
                passed.add(name)
                # Another run may have left out the module as a whole.
                modules.add(f"::{case.get('classname')}")
            else:
                skipped[name] = found.get("message", "")
    listed = [*LISTED, *(MISSING[name] for name in arguments.without)]
    unlisted = {
        name: reason
        for name, reason in skipped.items()
        if name not in passed | modules and not any(re.search(pattern, reason) for pattern in listed)
    }
    for name, reason in unlisted.items():
        print(f"skipped, and not listed in .ci/skips.py: {name}: {reason}", file=sys.stderr)
    known = len(skipped.keys() - passed - modules - unlisted.keys())
    print(f"{len(passed)} tests ran, {known} were skipped for listed reasons, {len(unlisted)} for others")
    return bool(unlisted)


if __name__ == "__main__":
    sys.exit(main())
