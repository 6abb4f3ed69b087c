"""A user's day with secrets: shards, a run on a server that wants a token and a password, evaluation, export with card,
and an error of each kind. `python -m tests.secrets_case FOLDER SECRETS.json`; the umask is that of whoever starts it.

Everything is written below FOLDER, and whatever is said goes to stdout and stderr.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from base64 import b64encode
from pathlib import Path
from typing import Any

STEPS = 2


def main(folder: Path, secrets: dict[str, str]) -> None:
    """Do it all. Raises AssertionError where a command that should work does not, or the other way round."""
    account = b64encode(f"me:{secrets['password']}".encode()).decode()
    os.environ |= {
        "HF_TOKEN": secrets["hub token"],
        "AWS_SECRET_ACCESS_KEY": secrets["environment key"],
        "FSSPEC_S3_SECRET": secrets["store key"],
        "FSSPEC_S3_KEY": "AKIAsomebody",
        "FSSPEC_HTTP": json.dumps(
            {"headers": {"Authorization": f"Basic {account}"}, "params": {"token": secrets["query token"]}}
        ),
        "HF_HUB_OFFLINE": "1",
    }
    from tests.coco_tree import write_tree
    from tests.shard_server import serve
    from tests.tiny import TINY
    from visft_ds import fit
    from visft_ds.cli import main as visft
    from visft_ds.data import remote
    from visft_ds.shards import inputs

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    remote.FIRST_WAIT = inputs._FIRST_PAUSE = 0.01  # type: ignore[misc]
    tree = write_tree(folder / "coco")
    assert visft(["shards", "build", *tree.arguments(folder / "shards", "train"), "--workers", "1", "--quiet"]) == 0
    assert visft(["shards", "build", *tree.arguments(folder / "shards", "val"), "--workers", "1", "--quiet"]) == 0
    settings: dict[str, Any] = {
        **TINY,
        "scheduler.params.total_num_steps": STEPS,
        "scheduler.params.warmup_num_steps": 1,
        "visft.heads.start": "random",
        "visft.run.save_every": STEPS,
        "visft.run.eval_every": STEPS,
        "visft.data.cache": str(folder / "cache"),
        "tensorboard": {"enabled": False},
        "comet": {"enabled": False, "api_key": secrets["tracker key"]},
    }
    with serve(folder / "shards") as served, serve(folder / "coco") as sources:
        served.authorization, served.query = f"Basic {account}", f"token={secrets['query token']}"
        sys.argv = ["my_script.py", "--hub-token", secrets["flag"], f"https://me:{secrets['password']}@host/log"]
        run, out = folder / "run", folder / "evaluation"
        assert fit(stage=2, model="debug", data=served.url, out=run, settings=settings).finished
        again = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
        words = ["--stage", "2", "--model", "debug", "--data", served.url, "--out", str(run), *again]
        assert visft(["train", *words, "--resume", "must"]) == 0  # the masked record is that of the same run
        assert visft(["train", *words, "--dry-run", "--json"]) == 0
        assert visft(["evaluate", "--run", str(run), "--out", str(out), "--images", "1"]) == 0
        export = [f"{run}/export/adapter", "--base", f"{run}/export/backbone.safetensors", "--out", f"{folder}/merged"]
        assert visft(["merge", "--adapter", *export, "--results", str(out)]) == 0

        served.faults.extend(["500"] * 99)
        assert _fails(visft, ["train", *words, "--out", f"{folder}/lost", "--set", "visft.data.cache=null"])
        served.query = "token=other"  # the server wants another one now
        assert _fails(visft, ["train", *words, "--resume", "must"])
        assert _fails(visft, ["shards", "info", "--data", served.url])
        signed = f"X-Amz-Signature={secrets['signature']}&sig={secrets['sas']}"
        for place in (
            f"{served.url}/x?{signed}",
            f"{served.url}/x?token={secrets['query token']}",
            f"http://me:{secrets['password']}@127.0.0.1:1/x",
            f"s3://AKIAsomebody:{secrets['store key']}@bucket/x",
            f"gs://{secrets['flag']}@bucket/x#access_token={secrets['sas']}",
            f"abfs://box@account.dfs.core.windows.net/x?{signed}",
            f"ftp://me:{secrets['password']}@127.0.0.1:1/x",
        ):
            assert _fails(visft, ["train", *words[:4], "--data", place, "--out", f"{folder}/a", *again])
            assert _fails(visft, ["train", *words, "--dry-run", "--json", "--data", place])
            assert _fails(visft, ["evaluate", "--run", str(run), "--data", place])
            assert _fails(visft, ["shards", "info", "--data", place, *words[:4], "--step", "1"])
            files = ["--images", str(tree.images), "--instances", place, "--out", f"{folder}/b", "--split", "b"]
            assert _fails(visft, ["shards", "build", *files, "--quiet"])
            assert _fails(visft, ["predict", place, "--model", str(run), "--out", f"{folder}/c"])
            assert _fails(visft, ["supervise", "--", "no-such-program", "train", "--data", place])
            assert _fails(visft, ["shards", "build", f"--token={secrets['flag']}", *files])
        # Those that are read: the signature is in no manifest, and in no record of the build.
        files = ["--images", str(tree.images), "--captions", f"{sources.url}/captions.json", "--split", "d"]
        # fsspec's configuration goes to all servers
        sources.authorization, sources.query = served.authorization, f"{signed}&token={secrets['query token']}"
        files[3] += f"?{signed}"
        assert visft(["shards", "build", *files, "--out", f"{folder}/d", "--quiet"]) == 0


def _fails(visft: Any, words: list[str]) -> bool:
    try:
        code = visft(words)
    except SystemExit as ended:  # argparse
        code = ended.code
    print(f"exit status {code} of {words[0]}", flush=True)
    return bool(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
