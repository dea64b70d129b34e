"""The other side of the row ``train_step``: the encoders of a pre-training step in PyTorch, run by an interpreter that has it.

Reads what to build as JSON, then answers every line of standard input with the seconds of one step: all runs of the encoders, backward,
clipping, AdamW. Scaled dot-product attention, one product for query, key and value: what a PyTorch user would write without compiling.
"""
import json
import os
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F


class Layer(nn.Module):
    def __init__(self, hidden, heads, dropout, pre_norm):
        super().__init__()
        self.heads, self.dropout, self.pre_norm = heads, dropout, pre_norm
        self.qkv, self.output = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.inner, self.outer = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)

    def attend(self, states, bias, rows):
        batch, length, hidden = states.shape
        query, key, value = self.qkv(states).view(batch, length, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)
        if rows:
            query, bias = query[:, :, :rows], None if bias is None else bias[:, :, :rows]
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=self.dropout)
        return self.output(context.transpose(1, 2).reshape(batch, -1, hidden))

    def drop(self, states):
        return F.dropout(states, self.dropout)

    def forward(self, states, bias, rows):
        queries = states[:, :rows] if rows else states
        if self.pre_norm:
            states = queries + self.drop(self.attend(self.norm1(states), bias, rows))
            return states + self.drop(self.outer(F.gelu(self.inner(self.norm2(states)))))
        states = self.norm1(queries + self.drop(self.attend(states, bias, rows)))
        return self.norm2(states + self.drop(self.outer(F.gelu(self.inner(states)))))


def build(about):
    """A function that takes one step."""
    torch.manual_seed(1)
    stacks = nn.ModuleDict({name: nn.ModuleList([Layer(about["hidden"], about["heads"], about["dropout"], name == "vision") for _ in range(count)])
                            for name, count in about["layers"].items()})
    runs = [(stacks[name], torch.randn(batch, length, about["hidden"]), rows, torch.zeros(batch, 1, length, length) if masked else None)
            for name, batch, length, rows, masked in about["calls"]]
    optimizer = torch.optim.AdamW(stacks.parameters(), lr=1e-5)

    def step():
        loss = 0.0
        for stack, states, rows, bias in runs:
            for number, layer in enumerate(stack):
                states = layer(states, bias, rows if number == len(stack) - 1 else 0)
            loss = loss + states.square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stacks.parameters(), about["clip"])
        optimizer.step()
        optimizer.zero_grad()
    return step


def main():
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    clock = time.process_time if os.environ.get("OMP_NUM_THREADS") == "1" else time.perf_counter
    step = build(json.loads(sys.stdin.readline()))
    print(torch.__version__, flush=True)
    for _ in sys.stdin:
        started = clock()
        step()
        print(clock() - started, flush=True)


if __name__ == "__main__":
    main()
