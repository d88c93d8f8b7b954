"""What bash completes, asked of bash itself; what zsh asks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("argcomplete")
SCRIPTS = Path(sys.executable).parent
# Each line of standard input up to the cursor, to what stands in its place, as on a press of the tab key.
COMPLETE = """
eval "$(register-python-argcomplete ear-vae)"
[[ $(complete -p ear-vae) =~ -F\\ ([^ ]+) ]] && function=${BASH_REMATCH[1]}
while IFS= read -r COMP_LINE; do
  COMP_POINT=${#COMP_LINE} COMP_TYPE=9 COMPREPLY=()
  read -ra COMP_WORDS <<<"$COMP_LINE"
  [[ $COMP_LINE != *" " ]] || COMP_WORDS+=("")
  COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
  "$function" ear-vae "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
  echo "${COMPREPLY[*]}"
done
"""


@pytest.mark.skipif(
    shutil.which("bash") is None or not (SCRIPTS / "register-python-argcomplete").exists(), reason="no bash"
)
def test_commands_options_values_and_files(tmp_path: Path) -> None:
    (tmp_path / "my song.mp3").touch()
    expected = {
        "ear-vae enc": "encode encode-dataset",
        "ear-vae reconstruct --pe": "--peak ",
        "ear-vae reconstruct --peak ": "keep scale clip",
        "ear-vae reconstruct my": r"my\ song.mp3 ",
        "ear-vae convert a b --to on": "onnx ",
        "ear-vae fit --config finetune_": "finetune_decoder ",
        "ear-vae fit --trainer.d": "--trainer.default_root_dir --trainer.devices",
        "ear-vae fit --data.folder m": r"my\ song.mp3 ",
    }
    result = subprocess.run(
        ["bash", "-c", COMPLETE],
        input="".join(f"{line}\n" for line in expected),
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert dict(zip(expected, result.stdout.split("\n"), strict=False)) == expected
    assert result.stderr == ""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
def test_zsh_asks_the_command_after_the_documented_lines(repository: Path) -> None:
    page = (repository / "docs" / "command-line.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^eval .*register-python-argcomplete.*$", page, re.MULTILINE)
    (first,) = re.findall(r"`(autoload [^`]*)`", page)
    # Without its cache, and without a question about folders of other users.
    script = f"{first.replace('&& compinit', '&& compinit -D -u')}\n{line}\nprint $_comps[ear-vae]"
    result = subprocess.run(
        ["zsh", "-f", "-c", script],
        env={**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (result.stdout, result.stderr) == ("_python_argcomplete\n", "")
