"""torch's compiler is imported when somebody needs it, and its guards do what they did before."""

from __future__ import annotations

import subprocess
import sys

FIT = """
import sys, torch
from torch import nn
from trainkit import Module, Trainer

class Net(Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:
            print("compiler" if "torch._dynamo" in sys.modules else "no compiler")
        return self.line(batch).square().mean()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

class Batches:
    def __iter__(self):
        return iter([torch.ones(2, 3)] * 3)

trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                  enable_model_summary=False)
module = Net()
trainer.fit(module, Batches())
(optimizer,) = trainer.optimizers
"""

AFTER = """
kept = "__dynamo_disable"
method = torch.optim.Optimizer.zero_grad.__wrapped__
ours = "lazy_compiler" in getattr(method, kept).__code__.co_filename
optimizer.zero_grad()
print(ours, "lazy_compiler" in getattr(method, kept).__code__.co_filename)
optimizer.load_state_dict(optimizer.state_dict())

@torch.compile(backend="eager")
def train(x):
    optimizer.zero_grad()
    module.line(x).sum().backward()
    return module.line.weight.grad.clone()

print(torch.equal(train(torch.ones(2, 3)), torch.full((1, 3), 2.0)))
"""


def run(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if not line.startswith("seed")]


def test_the_first_step_does_not_wait_for_the_compiler() -> None:
    assert run(FIT)[0] == "no compiler"


def test_once_the_compiler_is_there_torch_keeps_its_own_guards() -> None:
    assert run(FIT + AFTER)[1:] == ["True False", "True"]
