"""What a run will take, before it starts: memory by part, tokens, hours, disk; and whether it fits.

The plan is a model of the run. Its constants were measured on small runs on a CPU, and docs/engines.md compares it with three
runs. The parts of the memory are added; activations, rollouts and evaluation never exist at once, so only the largest of them
counts. Work is counted in floating-point operations of matrix products, and in kernels, whose fixed cost is most of a small
model's time. What an operation and a kernel cost is measured on this machine when the plan is made, or stated for a GPU by
`HARDWARE`.

For every token and layer the backward pass keeps, in floats (h width, i MLP width, q and k widths of queries and keys, c context):
    6h + 4i + 4q + c          with norms on queries and keys: + 2q + 2k
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdgeo import tasks
from opdgeo.errors import CheckpointError, ConfigError
from opdgeo.machine import available_memory, duration
from opdgeo.training import distributed
from opdgeo.training.config import TrainConfig

GB = 1e9
PROGRAM = 0.68 * GB  # Python with torch, transformers and TRL, before any weights
LOSS_CHUNK = 256  # tokens whose logits exist at once in a training step
LAYER_KERNELS = 45  # of one layer's forward pass
UPDATE_KERNELS = 60  # of one layer's share of clipping and AdamW
STEP_SECONDS = 0.10  # TRL's and accelerate's own work
START_SECONDS = 8.0  # imports and set-up


@dataclass(frozen=True)
class Shape:
    """What the plan needs to know of an architecture. `experts` and `active` are 1 for a dense model."""

    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    tied: bool
    normed: bool = True
    experts: int = 1
    active: int = 1

    @property
    def _attention(self) -> int:
        return self.width * self.head * 2 * (self.heads + self.kv_heads)

    def _layer(self, experts: int) -> int:
        router = self.width * self.experts if self.experts > 1 else 0
        return self._attention + 3 * self.width * self.mlp * experts + router

    @property
    def parameters(self) -> int:
        norms = self.layers * (2 * self.width + 2 * self.head * self.normed) + self.width
        return self.layers * self._layer(self.experts) + self.vocabulary * self.width * (2 - self.tied) + norms

    def flops(self, context: float) -> float:
        """Of one token's forward pass, the output layer included."""
        weights = self.layers * self._layer(self.active) + self.vocabulary * self.width
        return 2 * weights + 4 * self.layers * self.heads * self.head * context

    def activations(self, context: float) -> float:
        """Floats kept per token for the backward pass of one layer."""
        q, k = self.heads * self.head, self.kv_heads * self.head
        return 6 * self.width + 4 * self.mlp * self.active + 4 * q + (2 * q + 2 * k) * self.normed + context

    @property
    def cache(self) -> int:
        """Floats of keys and values per token."""
        return 2 * self.layers * self.kv_heads * self.head


def _qwen3(layers: int, width: int, mlp: int, heads: int, kv_heads: int = 8, **more: Any) -> Shape:
    return Shape(layers, width, mlp, heads, kv_heads, 128, 151936, **{"tied": False, **more})


# Released models that a plan may be asked for where their weights are not.
KNOWN = {
    "Qwen3-4B": _qwen3(36, 2560, 9728, 32, tied=True),
    "Qwen3-8B": _qwen3(36, 4096, 12288, 32),
    "Qwen3-14B": _qwen3(40, 5120, 17408, 40),
    "Qwen3-32B": _qwen3(64, 5120, 25600, 64),
    "Qwen3-30B-A3B": _qwen3(48, 2048, 768, 32, 4, experts=128, active=8),
}


@dataclass(frozen=True)
class Hardware:
    """One process's share of a machine: memory in bytes, matrix products in flops a second, a kernel's cost in seconds."""

    name: str
    processes: int
    memory: float
    rate: float
    kernel: float
    gpu: bool


# Dense bf16 peak × the share of it that training usually reaches (40 %); memory less what the driver keeps.
HARDWARE = {
    "a100": (80 * GB * 0.95, 312e12 * 0.4),
    "h100": (80 * GB * 0.95, 989e12 * 0.4),
    "h200": (141 * GB * 0.95, 989e12 * 0.4),
    "b200": (180 * GB * 0.95, 2250e12 * 0.4),
}
GPU_KERNEL = 8e-6


def hardware(stated: str | None) -> Hardware:
    """The machine at hand, measured in a second, or one of `HARDWARE` with a number of GPUs, such as h100x8.

    Raises:
        ConfigError: an unknown name.
    """
    if stated is not None:
        name, _, count = stated.lower().partition("x")
        if name not in HARDWARE or (count and not (count.isdigit() and int(count))):
            known = ", ".join(HARDWARE)
            raise ConfigError(f"the hardware is {stated!r}; expected one of {known}, with a number of GPUs: h100x8.")
        return Hardware(stated, int(count or 1), *HARDWARE[name], GPU_KERNEL, True)
    import torch

    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return Hardware(torch.cuda.get_device_name(), distributed.processes(), float(free), *_measured("cuda"), True)
    memory = available_memory() / distributed.processes()
    name = f"this machine's CPU, {torch.get_num_threads()} thread(s)"
    return Hardware(name, distributed.processes(), memory, *_measured("cpu"), False)


def _measured(device: str) -> tuple[float, float]:
    """(flops a second of matrix products, seconds of a kernel that does next to nothing), the best of several."""
    import torch

    # On a CPU the time of this thread is counted, because what other programs do meanwhile is no cost of the run.
    clock = time.perf_counter if device == "cuda" else time.thread_time

    def seconds(repeats: int, a: Any, wait: Any) -> float:
        taken = []
        for _ in range(15):
            wait()
            started = clock()
            for _ in range(repeats):
                torch.mm(a, a)
            wait()
            taken.append((clock() - started) / repeats)
        return min(taken)  # what the machine does when nothing else runs

    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    size = 4096 if device == "cuda" else 512
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    large = seconds(4, torch.ones(size, size, device=device, dtype=dtype), wait)
    small = seconds(200, torch.ones(8, 8, device=device, dtype=dtype), wait)
    efficiency = 0.4 if device == "cuda" else 0.55  # of a large product's rate that a whole model reaches
    return 2 * size**3 / large * efficiency, small * 3  # a real kernel does more than the smallest product


def shape(name: str) -> Shape:
    """The architecture of a model by name, from its config.json or from `KNOWN`.

    Raises:
        CheckpointError: it is neither on this machine nor known.
    """
    from opdgeo.checkpoints.huggingface import read_json
    from opdgeo.training import models

    for known in sorted(KNOWN, key=len, reverse=True):
        if name.removeprefix("Qwen/").partition("@")[0].removesuffix("-Base") == known and not Path(name).exists():
            return KNOWN[known]
    if name in models.SMOLLM2_RUN:
        name = models.SMOLLM2
    config = read_json(models.resolve(name) / "config.json")
    config = config.get("text_config", config)
    try:
        heads = config["num_attention_heads"]
        return Shape(
            layers=config["num_hidden_layers"],
            width=config["hidden_size"],
            mlp=config.get("moe_intermediate_size") or config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads", heads),
            head=config.get("head_dim") or config["hidden_size"] // heads,
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
            normed="qwen3" in config.get("model_type", ""),
            experts=config.get("num_experts") or config.get("num_local_experts") or 1,
            active=config.get("num_experts_per_tok") or 1,
        )
    except KeyError as error:
        raise CheckpointError(
            f"the config.json of {name} has no {error}; expected a Llama- or Qwen-like architecture. The plan knows no other."
        ) from None


@dataclass(frozen=True)
class Plan:
    """Bytes a process, tokens and seconds of the whole run, bytes on disk."""

    hardware: Hardware
    memory: dict[str, float]
    tokens: dict[str, float]
    seconds: dict[str, float]
    disk: dict[str, float]
    assumed: list[str]

    @property
    def peak(self) -> float:
        passing = ("activations", "rollouts", "evaluation")  # one at a time
        return sum(v for k, v in self.memory.items() if k not in passing) + max(
            self.memory.get(k, 0.0) for k in passing
        )


def plan(config: TrainConfig, machine: Hardware) -> Plan:
    """The plan of `config` on `machine`. Only headers are read and, where they are at hand, examples."""
    student = shape(config.origin) if config.origin != "ANCHOR" else shape(_released(config))
    teacher = shape(config.teacher) if config.teacher and not config.teacher_server else None
    assumed = ["the teacher's server answers at once"] if config.teacher_server else []
    prompt, completion, longest = _lengths(config, assumed)
    demonstrations = config.rollouts == "demonstrations"
    share = machine.processes if machine.gpu and machine.processes > 1 else 1
    if share > 1:
        assumed.append(f"FSDP2 or ZeRO-3: weights, gradients, optimizer and teacher in {share} shares")
    if machine.gpu:
        assumed.append("a GPU's speed is 40 % of its peak; not checked against a measured run on GPUs")

    # memory of one process
    held, left = divmod(config.sequences_per_step, machine.processes)
    if left:
        raise ConfigError(
            f"sequences_per_step is {config.sequences_per_step} and {machine.processes} processes share them; expected a multiple. "
            "Plan for another number of processes, or change sequences_per_step."
        )
    micro = min(config.micro_batch or held, held)
    length = (
        prompt + longest if not demonstrations else min(prompt + longest, config.max_prompt_tokens + config.max_tokens)
    )
    kept = student.layers * student.activations(length)
    if config.gradient_checkpointing:
        kept = student.layers * student.width + student.activations(length)
    half = machine.gpu and config.autocast
    number = 2 if half else 4  # bytes of an activation
    weights = 4.0 * student.parameters
    logits = 4.0 * 4 * min(LOSS_CHUNK, micro * length) * student.vocabulary
    memory = {
        "program": PROGRAM if not machine.gpu else 1.5 * GB,
        "weights": weights / share,
        "gradients": weights / share,
        "optimizer": 2 * weights / share,
        "activations": micro * length * kept * number + logits,
    }
    if half:
        memory["bf16 copies"] = 2.0 * student.parameters / (student.layers if share > 1 else 1) * 2
    if teacher is not None:
        memory["teacher"] = number * float(teacher.parameters) / share
    if not demonstrations:
        writing = held * config.updates_per_rollout
        if not config.uses_vllm:
            memory["rollouts"] = writing * ((prompt + longest) * student.cache * number + 4.0 * 4 * student.vocabulary)
        elif config.vllm == "colocate":
            memory["vLLM"] = config.vllm_memory * machine.memory
    if config.eval_prompts:
        memory["evaluation"] = _evaluation_memory(
            config, student, teacher, tokens=prompt + longest, machine=machine, number=number
        )

    # work of all processes, in tokens through the student's forward pass
    steps, sequences = config.steps, config.sequences_per_step
    tokens: dict[str, float] = {"trained": steps * sequences * (prompt + completion)}
    forward = student.flops((prompt + completion) / 2)
    passes = 4 if config.gradient_checkpointing else 3
    work = {"update": tokens["trained"] * forward * passes}
    rounds = -(-sequences // (micro * machine.processes))
    kernels: dict[str, float] = {"update": steps * student.layers * (LAYER_KERNELS * passes * rounds + UPDATE_KERNELS)}
    if not demonstrations:
        tokens["sampled"] = steps * sequences * completion
        drawn = 1.0
        if config.dynamic_sampling:
            drawn = 1.5
            assumed.append("a third of the groups has no reward variance and is sampled again")
        writer = teacher if config.rollouts == "teacher" and teacher is not None else student
        if config.replays is None:
            work["rollouts"] = drawn * steps * sequences * (prompt + completion) * writer.flops(prompt + completion)
            rollouts = steps / config.updates_per_rollout
            kernels["rollouts"] = drawn * rollouts * longest * (writer.layers * LAYER_KERNELS + 60)
        extra = (config.alpha > 0) + (config.updates_per_rollout > 1 and config.alpha == 0)
        work["credit"] = tokens["trained"] * forward * extra
        if teacher is not None and config.alpha > 0:
            work["credit"] += tokens["trained"] * teacher.flops((prompt + completion) / 2)
        kernels["credit"] = steps * rounds * student.layers * LAYER_KERNELS * 2 * extra
    if config.eval_prompts:
        measured = 2 * config.eval_prompts + config.eval_prompts_between * (len(config.checkpoint_steps) - 1)
        tokens["evaluated"] = measured * 2 * (prompt + completion)
        kl = 0.0 if teacher is None else teacher.flops(prompt) / forward
        work["evaluation"] = tokens["evaluated"] * forward * (1 + kl / 2)
        calls = len(config.checkpoint_steps) + 1 + measured / max(config.eval_batch, 1)
        kernels["evaluation"] = 2 * calls * longest * (student.layers * LAYER_KERNELS + 60)
    seconds = {"start": START_SECONDS}
    for part, flops in work.items():
        # Processes share a step's sequences; each launches its own kernels.
        seconds[part] = flops / (machine.rate * machine.processes) + kernels[part] * machine.kernel
    seconds["update"] += steps * STEP_SECONDS
    disk = {"checkpoints": len(config.checkpoint_steps) * weights, "resume state": 3 * weights}
    if config.record_rollouts:
        disk["rollouts.jsonl"] = steps * sequences * (prompt + completion) * 7.0
    return Plan(machine, memory, tokens, seconds, disk, assumed)


def _evaluation_memory(
    config: TrainConfig, student: Shape, teacher: Shape | None, *, tokens: float, machine: Hardware, number: int
) -> float:
    from opdgeo.training.evaluation import LOGITS_AT_ONCE

    batch = min(config.eval_batch, -(-config.eval_prompts // machine.processes))
    scored = min(LOGITS_AT_ONCE, batch * tokens * student.vocabulary)
    cache = batch * (tokens * student.cache * number + 4.0 * 4 * student.vocabulary)
    return cache + (scored * 4 * 5 if teacher is not None else 0)


def _released(config: TrainConfig) -> str:
    return "Qwen/Qwen3-8B-Base" if "Qwen3" in (config.teacher or "") else "tiny/base"


def _lengths(config: TrainConfig, assumed: list[str]) -> tuple[float, float, float]:
    """Mean tokens of a prompt, of a completion, and of the longest completion, from the task's demonstrations."""
    from opdgeo.training import models

    try:
        if config.task == "problems" and not Path(str(config.task_options.get("source", ""))).is_file():
            raise ConfigError("not at hand")
        made = config.origin in models.SMOLLM2_RUN  # perhaps not made yet; it has the released model's tokenizer
        tokenizer = models.load_tokenizer(models.resolve(models.SMOLLM2 if made else config.origin), config.end_token)
        examples = tasks.load(config.task, config.task_options).examples(64, config.data_seed, held_out=False)
        if config.chat:
            examples = models.as_chat(examples, tokenizer)
    except (ConfigError, CheckpointError):
        half = config.max_tokens / 2
        assumed.append(
            f"completions of {half:.0f} tokens, half of max_tokens, and prompts of {config.max_prompt_tokens // 8}"
        )
        return config.max_prompt_tokens / 8, half, config.max_tokens
    prompts = [len(tokenizer(e.prompt)["input_ids"]) if e.prompt else 0 for e in examples]
    completions = [min(config.max_tokens, len(tokenizer(e.completion)["input_ids"]) + 1) for e in examples]
    mean = sum(completions) / len(completions)
    if not any(e.completion for e in examples):
        mean = config.max_tokens / 2
        assumed.append(f"completions of {mean:.0f} tokens, half of max_tokens")
    # A batch is sampled until its longest completion ends, and one of many runs to the limit.
    longest = max(completions) if config.rollouts == "demonstrations" else config.max_tokens
    return sum(prompts) / len(prompts), mean, longest


def refuse_what_cannot_fit(made: Plan) -> None:
    """Raises:
    ConfigError: the peak is above the memory of a process; the message names the largest parts and what makes them smaller.
    """
    if made.peak <= made.hardware.memory:
        return
    largest = sorted(made.memory, key=lambda part: -made.memory[part])[:3]
    parts = ", ".join(f"{part} {made.memory[part] / GB:.1f} GB" for part in largest)
    cures = {
        "activations": "a smaller micro_batch or gradient_checkpointing = true",
        "rollouts": "a smaller rollout_prompts, or vLLM",
        "evaluation": "a smaller eval_batch",
        "vLLM": "a smaller vllm_memory",
    }
    cure = next(
        (cures[part] for part in largest if part in cures), "more processes with FSDP2 or ZeRO-3, or a smaller model"
    )
    raise ConfigError(
        f"this run needs about {made.peak / GB:.1f} GB a process ({parts}, …) and {made.hardware.memory / GB:.1f} GB are there on "
        f"{made.hardware.name}; expected room for it. Try {cure}."
    )


def describe(made: Plan) -> str:
    """The plan as text."""
    machine = made.hardware
    lines = [f"on {machine.name}, {machine.processes} process(es), memory of one:"]
    lines += [f"  {part:<14} {size / GB:>9.2f} GB" for part, size in made.memory.items()]
    lines.append(f"  {'peak':<14} {made.peak / GB:>9.2f} GB of {machine.memory / GB:.1f} GB")
    lines.append("tokens: " + ", ".join(f"{count / 1e6:.3g} M {part}" for part, count in made.tokens.items()))
    total = sum(made.seconds.values())
    lines.append(f"time: about {duration(total)}: " + ", ".join(f"{k} {duration(v)}" for k, v in made.seconds.items()))
    if machine.gpu:
        lines[-1] += f" ({total * machine.processes / 3600:.0f} GPU hours)"
    lines.append("disk: " + ", ".join(f"{part} {size / GB:.2f} GB" for part, size in made.disk.items()))
    lines += [f"assumed: {text}" for text in made.assumed]
    return "\n".join(lines)
