"""The other side of the row ``encoders``: the same stacks in PyTorch, run by an interpreter that has it (no other imports).

Reads lines "STACK TYPE" from standard input and answers each with the seconds of a forward pass. Scaled dot-product attention, weights in the
type that is measured, inference mode: what a PyTorch user would reach without compiling.
"""
import json
import os
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F


class Layer(nn.Module):
    def __init__(self, hidden, heads, pre_norm):
        super().__init__()
        self.heads, self.pre_norm = heads, pre_norm
        self.qkv, self.output = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.inner, self.outer = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)

    def attend(self, states, bias):
        batch, length, hidden = states.shape
        query, key, value = self.qkv(states).view(batch, length, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.output(context.transpose(1, 2).reshape(batch, length, hidden))

    def forward(self, states, bias):
        if self.pre_norm:
            states = states + self.attend(self.norm1(states), bias)
            return states + self.outer(F.gelu(self.inner(self.norm2(states))))
        states = self.norm1(states + self.attend(states, bias))
        return self.norm2(states + self.outer(F.gelu(self.inner(states))))


def stack(about, dtype):
    """A function that runs the stack that ``about`` describes."""
    torch.manual_seed(1)
    layers = nn.ModuleList([Layer(about["hidden"], about["heads"], about["pre_norm"]) for _ in range(about["layers"])]).eval().to(dtype)
    states = torch.randn(about["batch"], about["length"], about["hidden"]).to(dtype)
    bias = (torch.tensor(about["mask"])[None, None] - 1).mul(1e4).to(dtype) if about["mask"] else None

    def run():
        with torch.inference_mode():
            out = states
            for layer in layers:
                out = layer(out, bias)
            return out
    return run


def main():
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    clock = time.process_time if os.environ.get("OMP_NUM_THREADS") == "1" else time.perf_counter
    stacks, made = json.loads(sys.stdin.readline()), {}
    print(torch.__version__, flush=True)
    for line in sys.stdin:
        name, kind = line.split()
        run = made.setdefault(line, None) or stack(stacks[name], {"fp32": torch.float32, "bf16": torch.bfloat16}[kind])
        if made[line] is None:
            run()
            made[line] = run
        started = clock()
        run()
        print(clock() - started, flush=True)


if __name__ == "__main__":
    main()
