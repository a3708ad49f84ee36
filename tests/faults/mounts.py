"""Our commands where the disk is read-only, has no room or runs out of it, and without a network.

    unshare -Urmn python tests/faults/mounts.py FOLDER

needs a user namespace of its own: it mounts small file systems in FOLDER. Lines that begin with "found: " say as JSON,
for a command and a fault, the exit code, what was said, what was left, and what the same command made when there was
room.
"""  # fmt: skip

import contextlib
import hashlib
import io
import json
import os
import runpy
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
if __name__ == "__main__":
    os.environ |= {"JAX_NUM_CPU_DEVICES": "1", "HF_HOME": f"{sys.argv[1]}/empty"}
    os.environ.pop("HF_HUB_OFFLINE", None)

ROOT = Path(__file__).parents[2]


def arguments(name: str, inputs: Path, out: Path) -> list[str]:
    """A command of ours that writes `out`."""
    model = inputs / "models" / "columns"
    squad = inputs / "squad.json"
    return {
        "answer": f"scripts/answer.py --model-name {model} --input {inputs}/in.jsonl --output {out}/answers.jsonl "
        "--max-new-tokens 4 --batch-size 1",
        "evaluate": f"scripts/evaluate.py --ft-model {model} --dataset-name {squad} --rows isolated --repeats 0 "
        f"--max-new-tokens 4 --min-questions 1 --max-branches 4 --first-samples --output-dir {out}/evaluation",
        "hf_to_flax": f"convert/hf_to_flax.py --model {inputs}/models/hf --output {out}/flax",
        "flax_to_hf": f"convert/flax_to_hf.py --checkpoint {model} --output {out}/hf --max-shard-size 60KB",
        "pretrain": f"scripts/pretrain.py --model-name {inputs}/models/hf --random-init --dataset-name "
        f"{inputs}/web.jsonl --branch-count 2 --seq-length 8 --max-steps 24 --save-steps 4 --keep 1 --logging-steps 1 "
        f"--mesh 1 1 1 --output-dir {out}/run",
        "finetune": f"scripts/finetune.py --model-name {model} --dataset-name {squad} --min-questions 1 "
        "--max-length 160 --epochs 99 --max-steps 24 --save-steps 4 --keep 1 --logging-steps 1 --mesh 1 1 1 "
        f"--output-dir {out}/run",
    }[name].split()


def run(argv: list[str]) -> tuple[int, str]:
    """Exit code, and what was said on stderr."""
    said = io.StringIO()
    sys.argv = argv
    try:
        with contextlib.redirect_stderr(said):
            runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
    except SystemExit as end:
        return end.code, said.getvalue()
    except BaseException as error:
        return 1, f"Traceback: {error!r}"
    return 0, said.getvalue()


def made(name: str, out: Path) -> str:
    """What a command made, as one text; without what is measured and where it lies."""
    if name in ("pretrain", "finetune"):
        from pd_jax.files import digest, load_config, load_params

        lines = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
        curve = [(line["step"], line["loss"], line["grad_norm"]) for line in lines]
        return json.dumps([curve, digest(load_params(out / "run", load_config(out / "run")))])
    if name == "evaluate":
        rows = json.loads((out / "evaluation" / "results.json").read_text())["rows"]
        return json.dumps([[(r["ids"], r["answers"], r["ended"]) for r in row] for row in rows.values()])
    if name == "hf_to_flax":
        from pd_jax.files import digest, load_config, load_params

        return json.dumps(digest(load_params(out / "flax", load_config(out / "flax", ()))))
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return json.dumps([(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files])


def left(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def mount(disk: Path, *options: str) -> None:
    subprocess.run(["mount", *options, str(disk)], check=True)


def fill_behind(disk: Path, sign: Path) -> None:
    """When `sign` is there, the file system has no room any more."""

    def wait() -> None:
        while not sign.exists():
            time.sleep(0.01)
        used = os.statvfs(disk)
        mount(disk, "-o", f"remount,size={(used.f_blocks - used.f_bfree) * used.f_frsize // 1024 + 4}k")

    threading.Thread(target=wait, daemon=True).start()


MARK = "found: "
LITTLE = {"answer": "4k", "evaluate": "20k", "hf_to_flax": "60k", "flax_to_hf": "70k", "pretrain": None}


def tell(row: str, **found: object) -> None:
    print(MARK + json.dumps({"row": row, **found}), flush=True)


def main(folder: Path) -> None:
    for name in ("answer", "evaluate", "hf_to_flax", "flax_to_hf", "pretrain"):
        disk = folder / f"{name}-undisturbed"
        code, said = run(arguments(name, folder, disk))
        tell(f"{name}, undisturbed", code=code, said=said, made=made(name, disk))
        for fault in ("read-only", "no room", "room runs out"):
            disk = folder / f"{name}-{fault.replace(' ', '-')}"
            disk.mkdir()
            mount(disk, "-t", "tmpfs", "-o", f"size={'4k' if fault == 'no room' else '200m'}", "tmpfs")
            if fault == "read-only":
                mount(disk, "-o", "remount,ro")
            elif fault == "no room":
                (disk / "full").write_bytes(b"x" * 4096)
            elif name == "pretrain":
                fill_behind(disk, disk / "run" / "checkpoints" / "8")
            else:
                mount(disk, "-o", f"remount,size={LITTLE[name]}")
            code, said = run(arguments(name, folder, disk))
            there = left(disk)
            mount(disk, "-o", "remount,rw,size=200m")
            (disk / "full").unlink(missing_ok=True)
            again, more = run(arguments(name, folder, disk))
            new = more if again else made(name, disk)
            tell(f"{name}, {fault}", code=code, said=said, left=there, again=again, made=new)
    for name, argv in {
        "model": ["scripts/demo.py", "--model-name", "Qwen/Qwen3-0.6B"],
        "questions": [
            *["scripts/finetune.py", "--model-name", str(folder / "models" / "hf"), "--random-init"],
            *["--output-dir", str(folder / "tuned")],
        ],
        "documents": [
            *["scripts/pretrain.py", "--model-name", str(folder / "models" / "hf"), "--random-init", "--streaming"],
            *["--output-dir", str(folder / "trained")],
        ],
    }.items():
        began = time.monotonic()
        code, said = run(argv)
        there = [str(folder / x) for x in ("tuned", "trained") if (folder / x).exists()]
        tell(f"{name}, no network", code=code, said=said, left=there, seconds=time.monotonic() - began)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
