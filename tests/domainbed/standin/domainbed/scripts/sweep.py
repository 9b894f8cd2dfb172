import argparse
import hashlib
import json
import os
import shlex

from domainbed import algorithms, command_launchers

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["launch"])
    parser.add_argument("--algorithms", nargs="+", type=str, default=algorithms.ALGORITHMS)
    parser.add_argument("--output_dir", type=str, required=True)
    parser.add_argument("--data_dir", type=str, required=True)
    parser.add_argument("--command_launcher", type=str, required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--skip_confirmation", action="store_true")
    args = parser.parse_args()

    commands = []
    for algorithm in args.algorithms:
        job = {"algorithm": algorithm, "data_dir": args.data_dir, "steps": args.steps}
        name = hashlib.md5(json.dumps(job, sort_keys=True).encode()).hexdigest()
        job["output_dir"] = os.path.join(args.output_dir, name)
        options = [f"--{k} {shlex.quote(str(v))}" for k, v in sorted(job.items())]
        commands.append(" ".join(["python -m domainbed.scripts.train", *options]))
    command_launchers.REGISTRY[args.command_launcher](commands)
