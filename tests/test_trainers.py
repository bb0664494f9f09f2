"""What the README shows for trainers: two ranks train with it, stop at a checkpoint, and go on in new objects as if they had not."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

import commopt
from ranks import flat, free_port, same_everywhere

STEPS, HALF = 16, 8
ROOT = pathlib.Path(__file__).parent.parent


def shown(beginning: str) -> str:
    """The README's Python that begins like that."""
    return re.search(rf"```python\n({re.escape(beginning)}.*?)```", (ROOT / "README.md").read_text(), re.S)[1]


def data() -> torch.utils.data.TensorDataset:
    x = torch.randn(2 * 8 * STEPS, 64, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.TensorDataset(x, x[:, :1].sin())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1))

    def forward(self, x, y):
        return {"loss": (self.layers(x) - y).square().mean()}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


Trained = tuple[nn.Module, commopt.State]


def accelerate(folder: str, resumed: bool) -> Trained:
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True), Net()
    optimizer, loader = optimizer_of(model), torch.utils.data.DataLoader(data(), batch_size=8)
    given = dict(accelerator=accelerator, commopt=commopt, model=model, optimizer=optimizer, loader=loader)
    exec(shown("model, optimizer, loader = accelerator"), given)
    model, optimizer, handle = given["model"], given["optimizer"], given["handle"]
    if resumed:
        accelerator.load_state(folder)
    for step, (x, y) in enumerate(given["loader"]):
        if step >= HALF or not resumed:
            accelerator.backward(model(x, y)["loss"])
            accelerator.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad()
        if step == HALF - 1 and not resumed:
            accelerator.save_state(folder)
    return accelerator.unwrap_model(model), handle


def trainer(folder: str, resumed: bool) -> Trained:
    import transformers

    model = Net()
    arguments = transformers.TrainingArguments(
        folder, use_cpu=True, per_device_train_batch_size=8, num_train_epochs=1, save_steps=HALF, report_to=[], disable_tqdm=True, logging_steps=1000,
        lr_scheduler_type="constant", max_grad_norm=10.0, ddp_backend="gloo")
    collate = lambda rows: {"x": torch.stack([x for x, _ in rows]), "y": torch.stack([y for _, y in rows])}
    trainer = transformers.Trainer(model, arguments, train_dataset=data(), data_collator=collate, optimizers=(optimizer_of(model), None))
    given = dict(trainer=trainer, commopt=commopt, torch=torch, transformers=transformers)
    exec(shown("class Compressed(transformers."), given)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{HALF}" if resumed else None)
    return model, next(c for c in trainer.callback_handler.callbacks if type(c) is given["Compressed"]).handle


def lightning(folder: str, resumed: bool) -> Trained:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, index):
            return self.net(*batch)["loss"]

        def configure_optimizers(self):
            return optimizer_of(self)

    given = dict(lightning=lightning, commopt=commopt)
    exec(shown("class Compressed(lightning."), given)
    compressed = given["Compressed"]()
    saves = lightning.pytorch.callbacks.ModelCheckpoint(folder, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    fit = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, limit_train_batches=HALF, gradient_clip_val=10.0, callbacks=[compressed, saves], logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder)
    module = Module()
    fit.fit(module, torch.utils.data.DataLoader(data(), batch_size=8), ckpt_path=f"{folder}/epoch=0.ckpt" if resumed else None)
    return module.net, compressed.handle


def main(way: str, folder: str) -> None:
    torch.set_num_threads(1)
    train = {"accelerate": accelerate, "transformers": trainer, "lightning": lightning}[way]
    begin, ends, facts = flat(Net().parameters()), [], []
    for resumed in (False, True):
        model, handle = train(folder, resumed)
        same_everywhere(model.parameters(), way)
        ends.append(flat(model.parameters()))
        kept = handle.state_dict()
        facts.append({"step": kept["step"], "ratio": handle.stats()["ratio"], "residual": float(flat(kept["residual"].values()).norm())})
    if dist.get_rank() == 0:
        print(json.dumps({"went": float((ends[0] - begin).norm()), "apart": float((ends[0] - ends[1]).norm()), "runs": facts}))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads let go of a last tensor late, which in an exiting interpreter aborts: one run in five without commopt


@pytest.mark.parametrize("way", ["accelerate", "transformers", "lightning"])
def test_a_trainer_trains_and_resumes(way, tmp_path):
    if importlib.util.find_spec(way) is None:
        pytest.skip(f"{way} is not installed")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", __file__, way, str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    said = json.loads(done.stdout.splitlines()[-1])
    whole, resumed = said["runs"]
    assert whole["step"] == resumed["step"] == STEPS - 1 and whole["ratio"] > 4, said
    assert resumed["ratio"] > 6, f"the first step after a checkpoint is compressed: {said}"
    assert 0 < said["apart"] < 0.025 * said["went"], f"what was kept is averaged in a checkpoint, and nothing else differs: {said}"
    assert abs(whole["residual"] - resumed["residual"]) < 0.1 * whole["residual"], said


if __name__ == "__main__":
    main(*sys.argv[1:])
