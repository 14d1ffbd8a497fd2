"""Forward and backward of our language model beside transformers' OLMoE with the same weights, in one process.

    python -m benchmarks.olmoe [--width 512] [--depth 4] [--experts 64] [--active 8] [--expert-hidden 256]
                               [--batch 4] [--length 512] [--vocabulary 8192] [--repeats 7]
                               [--ways eager,grouped_mm]

Prints one JSON line for each of `--ways`, in which transformers computes experts: seconds of forward and backward, the
median of turns that alternate, theirs and ours, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import OlmoeConfig, OlmoeForCausalLM

from dit_moe.interop.olmoe import from_olmoe
from dit_moe.text.objective import next_token_losses

WAYS = ("eager", "batched_mm", "grouped_mm")


def seconds(step: Callable[[], torch.Tensor], network: nn.Module) -> float:
    start = time.perf_counter()
    step().backward()
    passed = time.perf_counter() - start
    network.zero_grad()
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"width": 512, "depth": 4, "experts": 64, "active": 8, "expert-hidden": 256, "batch": 4, "length": 512}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--ways", default="eager,grouped_mm", help=f"of {', '.join(WAYS)}")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=args.expert_hidden,
        num_hidden_layers=args.depth,
        num_attention_heads=args.width // 64,
        num_experts=args.experts,
        num_experts_per_tok=args.active,
        max_position_embeddings=args.length,
        pad_token_id=None,
        eos_token_id=None,
    )
    tokens = torch.randint(args.vocabulary, (args.batch, args.length))
    for way in args.ways.split(","):
        theirs = OlmoeForCausalLM(config).train()
        theirs.set_experts_implementation(way)
        ours = from_olmoe(theirs).train()

        def step_of_theirs(model: nn.Module = theirs) -> torch.Tensor:
            return model(tokens, labels=tokens, use_cache=False).loss

        def step_of_ours(model: nn.Module = ours) -> torch.Tensor:
            return next_token_losses(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())[0]

        times = [(seconds(step_of_theirs, theirs), seconds(step_of_ours, ours)) for _ in range(args.repeats + 1)][1:]
        theirs_s, ours_s = (statistics.median(column) for column in zip(*times, strict=True))
        line = {"experts": way, "theirs_s": round(theirs_s, 4), "ours_s": round(ours_s, 4)}
        print(json.dumps(line | {"ours_over_theirs": round(ours_s / theirs_s, 3), "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
