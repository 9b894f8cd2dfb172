import argparse
import json
import os
import time

import numpy as np
import torch

from domainbed import algorithms, datasets, hparams_registry
from domainbed.lib import misc
from domainbed.lib.fast_data_loader import FastDataLoader, InfiniteDataLoader

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data_dir", type=str)
    parser.add_argument("--dataset", type=str, default="Debug28")
    parser.add_argument("--algorithm", type=str, default="ERM")
    parser.add_argument("--hparams", type=str)
    parser.add_argument("--hparams_seed", type=int, default=0)
    parser.add_argument("--trial_seed", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--checkpoint_freq", type=int, default=10)
    parser.add_argument("--test_envs", type=int, nargs="+", default=[0])
    parser.add_argument("--output_dir", type=str, default="train_output")
    parser.add_argument("--skip_model_save", action="store_true")
    args = parser.parse_args()
    os.makedirs(args.output_dir, exist_ok=True)

    if args.hparams_seed == 0:
        hparams = hparams_registry.default_hparams(args.algorithm, args.dataset)
    else:
        seed = misc.seed_hash(args.hparams_seed, args.trial_seed)
        hparams = hparams_registry.random_hparams(args.algorithm, args.dataset, seed)
    if args.hparams:
        hparams.update(json.loads(args.hparams))

    torch.manual_seed(args.seed)
    dataset = vars(datasets)[args.dataset](args.data_dir, args.test_envs, hparams)
    train = [e for i, e in enumerate(dataset) if i not in args.test_envs]
    train_loaders = [InfiniteDataLoader(env, hparams["batch_size"]) for env in train]
    eval_loaders = [FastDataLoader(env) for env in dataset]
    algorithm = algorithms.get_algorithm_class(args.algorithm)(
        dataset.input_shape, dataset.num_classes, len(train), hparams
    )
    algorithm.to("cpu")

    minibatches = zip(*train_loaders, strict=True)
    values = {}
    for step in range(args.steps):
        start = time.time()
        batch = [(x, y) for x, y in next(minibatches)]
        step_values = algorithm.update(batch, None)
        values.setdefault("step_time", []).append(time.time() - start)
        for key, value in step_values.items():
            values.setdefault(key, []).append(value)
        if step % args.checkpoint_freq == 0 or step == args.steps - 1:
            results = {"step": step, **{key: np.mean(value) for key, value in values.items()}}
            for i, loader in enumerate(eval_loaders):
                results[f"env{i}_in_acc"] = misc.accuracy(algorithm, loader, None, "cpu")
            results.update({"mem_gb": 0.0, "hparams": hparams, "args": vars(args)})
            with open(os.path.join(args.output_dir, "results.jsonl"), "a") as file:
                file.write(json.dumps(results, sort_keys=True) + "\n")
            print(step, results["loss"])
            values = {}
    if not args.skip_model_save:
        state = {"model_dict": algorithm.state_dict(), "model_hparams": hparams}
        torch.save(state, os.path.join(args.output_dir, "model.pkl"))
    with open(os.path.join(args.output_dir, "done"), "w") as file:
        file.write("done")
