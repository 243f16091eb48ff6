"""Watch where the weights go while TRL's own trainers run: two lines in yours.

    python examples/monitor_in_trl.py distillation     # on-policy, exact reverse KL to the packaged teacher
    python examples/monitor_in_trl.py sft              # on worked solutions

Every row of the log that is printed has `geometry/…` beside the loss; `report_to="tensorboard"`, "trackio" or "wandb" sends
the same rows there. docs/monitor.md says what each number is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer

import opdgeo
from opdgeo import GeometryMonitor
from opdgeo.tasks.arithmetic import Arithmetic

TINY = Path(opdgeo.__file__).parent / "assets" / "tiny"  # a student and a teacher that come with the package


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("trainer", choices=["distillation", "sft"])
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--every", type=int, default=5, help="steps between two measurements")
    options.add_argument("--sequences", type=int, default=16, help="of a step")
    options.add_argument("--out", default="monitored", help="folder for checkpoint-N")
    args = options.parse_args()

    problems = Arithmetic().examples(args.steps * args.sequences, 0, held_out=False)
    settings = dict(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=args.sequences,
        learning_rate=1e-4,
        report_to="none",
        logging_steps=args.every,
        save_steps=args.every,
        save_only_model=True,
        bf16=False,
    )
    # A model that is named by its folder is loaded in fp32, so that no update is lost to rounding.
    if args.trainer == "distillation":
        trainer = DistillationTrainer(
            model=str(TINY / "base"),
            teacher_model=str(TINY / "teacher"),
            args=DistillationConfig(**settings, beta=1.0, max_completion_length=32),  # 1: reverse KL
            train_dataset=Dataset.from_list([{"prompt": p.prompt} for p in problems]),
        )
    else:
        trainer = SFTTrainer(
            model=str(TINY / "base"),
            args=SFTConfig(**settings),
            train_dataset=Dataset.from_list([{"prompt": p.prompt, "completion": p.completion} for p in problems]),
        )
    trainer.add_callback(GeometryMonitor(every=args.every))
    trainer.train()


if __name__ == "__main__":
    main()
