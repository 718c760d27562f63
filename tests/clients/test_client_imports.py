"""The client stays thin."""

import subprocess
import sys

HEAVY = ["torch", "onnxruntime", "transformers", "tokenizers", "onnx", "dspark_backend", "dspark_export", "pytriton"]


def test_the_client_and_its_command_import_nothing_heavy():
    code = (
        "import sys, dspark_client, dspark_client.cli\n"
        f"print(*(name for name in {HEAVY!r} if name in sys.modules), end='')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_public_name_exists():
    import dspark_client

    for name in dspark_client.__all__:
        assert getattr(dspark_client, name).__doc__
