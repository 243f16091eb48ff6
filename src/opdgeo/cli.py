"""The command line. Only the standard library is imported here, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NoReturn

from opdgeo.errors import ConfigError, OpdgeoError

DONE, BUG, REFUSED, INCOMPLETE = 0, 1, 2, 3

EPILOG = """\
examples:
  opdgeo compare Qwen3-8B-Base/ my-sft-run/checkpoint-500 -o update
  opdgeo track anchor/ runs/opd -o trajectory
  opdgeo train opd --steps 100 -o runs/opd
  opdgeo reproduce --seeds 3 -o study

exit status: 0 done; 2 the request cannot be met; 3 finished, but some matrices were not computed; 1 a bug
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    main = argparse.ArgumentParser(
        prog="opdgeo",
        description="Where post-training moves a language model's weights.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    main.add_argument("--version", action="store_true", help="print the version and exit")
    commands = main.add_subparsers(dest="command", metavar="COMMAND")

    compare = commands.add_parser(
        "compare",
        help="measure one update",
        description="Measure the update from BASE to TUNED, matrix by matrix, beside null models.",
    )
    compare.add_argument(
        "base",
        metavar="BASE",
        help="checkpoint before training: a folder or file of weights in any format of docs/formats.md",
    )
    compare.add_argument("tuned", metavar="TUNED", help="checkpoint after training, or a PEFT adapter of BASE")
    _survey_options(compare)
    compare.set_defaults(run=_compare)

    track = commands.add_parser(
        "track",
        help="measure a trajectory",
        description="Measure every checkpoint of a run against BASE, and how early the final update subspace appears.",
    )
    track.add_argument("base", metavar="BASE", help="the checkpoint where training started")
    track.add_argument(
        "checkpoints",
        metavar="RUN_DIR | CKPT",
        nargs="+",
        help="a folder of step-* or checkpoint-* folders, or checkpoints in order",
    )
    track.add_argument(
        "--follow",
        action="store_true",
        help="measure a run that is still going on, checkpoint by checkpoint, until it says that it is over",
    )
    track.add_argument(
        "--idle",
        type=float,
        default=30.0,
        metavar="MINUTES",
        help="end --follow after so long without a new one (default: 30)",
    )
    _survey_options(track)
    track.set_defaults(run=_track)

    train = commands.add_parser(
        "train",
        help="train one arm: sft, opd or rlvr",
        description="Train one arm on TRL. The three paradigms share the model, the task and the trainer; they differ in who "
        "writes the tokens and what credit a token gets.",
    )
    train.add_argument(
        "paradigm",
        metavar="{sft|opd|rlvr}",
        help="demonstrations, teacher gap, or verifier reward; or another arm of the preset, such as sft-matched",
    )
    train.add_argument(
        "--preset", default="tiny", help="models, task and settings: tiny (default), smollm2 or qwen3-8b"
    )
    train.add_argument("-o", "--out", type=Path, help="the arm's folder (default: opdgeo-PARADIGM)")
    train.add_argument("--model", help="start from this checkpoint instead of the preset's")
    train.add_argument("--steps", type=int, help="optimizer steps")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument(
        "--alpha", type=float, help="share of the teacher's signal in the advantage: 1 is OPD, 0 is RLVR"
    )
    train.add_argument("--token-share", type=float, help="train on this share of each sample's tokens, rescaled")
    train.add_argument(
        "--token-choice", choices=("top", "random"), help="which tokens: largest student-teacher gap, or random"
    )
    train.add_argument(
        "--rollouts",
        metavar="student|teacher|FILE",
        help="who writes the tokens of opd and rlvr: student, teacher, or the rollouts.jsonl of an earlier run",
    )
    train.add_argument(
        "--vllm",
        choices=("off", "colocate", "server"),
        help="let vLLM write the student's rollouts, here or on a server",
    )
    train.add_argument(
        "--record-rollouts", action="store_true", default=None, help="keep every completion in OUT/rollouts.jsonl"
    )
    train.add_argument(
        "--monitor",
        type=int,
        metavar="STEPS",
        help="measure the update's geometry every so many steps (default: 25; 0: never)",
    )
    train.add_argument("--channel", help="hold the update in this channel: what `opdgeo channel` wrote")
    train.add_argument(
        "--constrain",
        choices=("gradient", "update", "adapter"),
        help="project gradients (the paper), the update too (exact), or train a LoRA with a frozen A (exact, less memory)",
    )
    train.add_argument(
        "--moments", choices=("reset", "project", "keep"), help="Adam's moments at the start (default: reset)"
    )
    train.add_argument(
        "--unconstrained", choices=("free", "frozen"), help="parameters that the channel does not hold (default: free)"
    )
    train.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        dest="settings",
        help="any other setting of OUT/config.json, the value as JSON, such as micro_batch=2",
    )
    train.add_argument(
        "--plan",
        nargs="?",
        const="",
        metavar="HARDWARE",
        help="only say what the run would take, by part, here or on stated hardware such as h100x8; refuse what cannot fit",
    )
    train.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "evaluate",
        help="avg@k of a checkpoint on problems with answers",
        description="Sample k completions of every problem, verify them, and write the share that is right (avg@k) with its "
        "settings to OUT/evaluation.json and every completion to OUT/completions.jsonl.",
    )
    evaluate.add_argument("model", metavar="CKPT", help="checkpoint folder, preset model or hub id")
    evaluate.add_argument(
        "problems",
        metavar="PROBLEMS",
        help="a .jsonl or .parquet file with prompt (or problem) and answer, a dataset of the hub such as HuggingFaceH4/aime_2024, "
        "or `task`: the held-out problems of the run that CKPT belongs to",
    )
    evaluate.add_argument("-k", type=int, default=8, help="samples of a problem (default: 8)")
    evaluate.add_argument("-o", "--out", type=Path, default=Path("opdgeo-evaluation"), help="folder for the results")
    evaluate.add_argument("--limit", type=int, help="the first so many problems only")
    evaluate.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: 1)")
    evaluate.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (default: 1, off)")
    evaluate.add_argument("--max-tokens", type=int, default=8192, help="longest completion (default: 8192)")
    evaluate.add_argument("--batch", type=int, default=16, help="completions at a time (default: 16)")
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument("--plain", action="store_true", help="prompts as they are, without the chat template")
    evaluate.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    evaluate.set_defaults(run=_evaluate)

    reproduce = commands.add_parser(
        "reproduce",
        help="train all arms, measure them, and judge the paper's claims",
        description="Train SFT, OPD, RLVR and a matched SFT from a shared anchor, with --study full also every control, measure every "
        "update and trajectory, and judge each claim by a rule written before the run. Finished parts are kept: the same command "
        "goes on after an interruption.",
    )
    reproduce.add_argument("--preset", default="tiny", help="models, task and settings (default: tiny)")
    reproduce.add_argument(
        "-o", "--out", type=Path, default=Path("opdgeo-study"), help="folder of the study (default: opdgeo-study)"
    )
    reproduce.add_argument(
        "--seeds", type=int, default=1, help="independent repetitions, each with its own anchor (default: 1)"
    )
    reproduce.add_argument(
        "--study",
        choices=("small", "full"),
        default="small",
        help="small: the four paradigms (default); full: every control, with --seeds 3 in two to three hours on two cores",
    )
    reproduce.add_argument("--workers", type=int, help="arms trained at a time (default: one per CPU core, at most 2)")
    reproduce.add_argument(
        "--rehearse",
        action="store_true",
        help="give every arm a few steps: whether the whole study runs, not what it finds",
    )
    reproduce.set_defaults(run=_reproduce)

    signals = commands.add_parser(
        "signals",
        help="compare the gradients that SFT, OPD and RLVR give a checkpoint",
        description="At each checkpoint, sample held-out prompts and take the gradient of every token under every objective (SFT, OPD, "
        "RLVR, their mixtures, token masks). Says how many directions the gradients of an objective fill, how far the objectives' "
        "second moments agree with each other, with chance, with credit of random sign and with the weights' principal directions, what "
        "masking tokens does, and whether mixtures follow the paper's formula.",
        epilog="example: opdgeo signals runs/opd/step-000020 runs/opd/step-000100 -o signals",
    )
    signals.add_argument(
        "checkpoints",
        metavar="CHECKPOINT | RUN_DIR",
        nargs="+",
        help="Hugging Face folders, a run's folder (all its checkpoints), or tiny/base",
    )
    signals.add_argument(
        "-o", "--out", type=Path, default=Path("opdgeo-signals"), help="results folder (default: opdgeo-signals)"
    )
    signals.add_argument("--teacher", help="gives OPD's credit (default: the run's own, else the preset's)")
    signals.add_argument(
        "--preset", default="tiny", help="task, lengths and teacher of a checkpoint outside a run (default: tiny)"
    )
    signals.add_argument("--task", help="another task than the run's")
    signals.add_argument("--prompts", type=int, default=64, help="held-out prompts; at least 4 (default: 64)")
    signals.add_argument("--generations", type=int, default=8, help="samples of one prompt (default: 8)")
    signals.add_argument(
        "--roles", default="all", help="attention, mlp, all or role names such as q_proj,o_proj (default: all)"
    )
    signals.add_argument("--layers", help="such as 0,3, or all (default: the middle and the last)")
    signals.add_argument("--top-k", type=int, default=16, help="leading directions compared (default: 16)")
    signals.add_argument("--seed", type=int, default=0, help="of prompts, samples, masks and bootstrap (default: 0)")
    signals.add_argument("--no-report", action="store_true", help="write the data files only, no report.html")
    signals.set_defaults(run=_signals)

    channel = commands.add_parser(
        "channel",
        help="extract the subspace of an update, as a PEFT adapter too",
        description="The top-K singular subspace of the update from BASE to CKPT for every matrix, in DIR/channel.safetensors, and as "
        "a LoRA adapter of BASE in DIR/adapter. `opdgeo train … --channel DIR --constrain update` holds training in it.",
    )
    channel.add_argument("base", metavar="BASE", help="checkpoint before training")
    channel.add_argument("tuned", metavar="CKPT", help="checkpoint after training")
    channel.add_argument(
        "-k", default="16", help="directions of a matrix: a number, a share of its energy such as 0.9, or stable_rank"
    )
    channel.add_argument(
        "-o", "--out", type=Path, default=Path("opdgeo-channel"), help="folder (default: opdgeo-channel)"
    )
    channel.add_argument(
        "--side", choices=("right", "left"), default="right", help="directions of inputs (default) or outputs"
    )
    channel.add_argument("--roles", default="all", help="as for compare (default: all)")
    channel.set_defaults(run=_channel)

    cache = commands.add_parser(
        "cache",
        help="list or clear the kept factors of base checkpoints",
        description="compare and track keep the factors of BASE, so that its next checkpoint takes about half the time. The folder "
        "is $OPDGEO_CACHE, else opdgeo/spectra in the user's cache folder; $OPDGEO_CACHE_GB is its limit (default: 20).",
    )
    cache.add_argument("action", choices=("list", "clear"), nargs="?", default="list")
    cache.set_defaults(run=_cache)

    report = commands.add_parser(
        "report", help="rebuild the page from the data files", description="Rebuild report.html from the data files."
    )
    report.add_argument("out", metavar="OUT", nargs="+", type=Path, help="results folders")
    report.add_argument("--figures", action="store_true", help="also write figures/*.svg and figures/*.pdf")
    report.add_argument(
        "--markdown", type=Path, metavar="FILE", help="also write what one study found as a page of text"
    )
    report.set_defaults(run=_report)
    return main


def _survey_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "-o", "--out", type=Path, default=Path("opdgeo-out"), help="results folder (default: opdgeo-out)"
    )
    command.add_argument(
        "--roles", default="all", help="attention, mlp, all or role names such as q_proj,o_proj (default: all)"
    )
    command.add_argument("--rank", type=int, default=512, help="rank of the principal subspaces (default: 512)")
    command.add_argument("--top-k", type=int, default=16, help="singular triplets of the update (default: 16)")
    command.add_argument(
        "--mask-rank", type=int, default=64, help="rank behind the principal mask and energy (default: 64)"
    )
    command.add_argument(
        "--mask-share", default="0.5,0.3", help="mask sizes as shares of the entries (default: 0.5,0.3)"
    )
    command.add_argument(
        "--eta", type=float, default=1e-3, help="relative tolerance of an unchanged entry (default: 1e-3)"
    )
    command.add_argument(
        "--nulls",
        type=int,
        default=4,
        help="null updates drawn per matrix where no closed form serves; 0 for no nulls (default: 4)",
    )
    command.add_argument(
        "--null", choices=("gaussian", "shuffled"), default="gaussian", help="null model (default: gaussian)"
    )
    command.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="where matrices are measured (default: local)"
    )
    command.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="the Ray cluster of --engine ray; its nodes see the checkpoints at the same paths (default: $RAY_ADDRESS, else one on this machine)",
    )
    command.add_argument("--workers", type=int, help="matrices measured at a time (default: one per CPU core)")
    command.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    command.add_argument(
        "--plan",
        action="store_true",
        help="only say what would be measured, in how much time and memory; reads headers",
    )
    command.add_argument("--no-cache", action="store_true", help="neither read nor keep the base's factors on disk")
    command.add_argument("--no-report", action="store_true", help="write the data files only, no report.html")


def _settings(args: argparse.Namespace):  # type: ignore[no-untyped-def]
    from opdgeo.diagnostics import Settings

    try:
        shares = tuple(float(x) for x in args.mask_share.split(","))
    except ValueError:
        raise ConfigError(f"--mask-share is {args.mask_share!r}; expected numbers such as 0.5,0.3.") from None
    return Settings(args.rank, args.top_k, args.mask_rank, shares, args.eta, args.nulls, args.null)


def _compare(args: argparse.Namespace) -> int:
    from opdgeo.survey import compare

    if args.plan:
        return _plan(args, [args.tuned])
    return _finish(args, compare(args.base, args.tuned, **_survey_arguments(args)))


def _track(args: argparse.Namespace) -> int:
    from opdgeo.survey import track

    if args.plan:
        return _plan(args, args.checkpoints)
    if args.follow:
        return _finish(args, _follow(args))
    return _finish(args, track(args.base, args.checkpoints, **_survey_arguments(args)))


def _follow(args: argparse.Namespace):  # type: ignore[no-untyped-def]
    from opdgeo.report import write_report
    from opdgeo.survey.follow import follow

    if len(args.checkpoints) != 1 or args.engine != "local":
        raise ConfigError("--follow takes one run folder and measures on this machine. Leave the rest out.")
    wanted = _survey_arguments(args)

    def report(_: object) -> None:
        if not args.no_report:
            write_report(args.out)

    return follow(
        args.base, args.checkpoints[0], args.out, idle=args.idle,
        tell=lambda text: print(f"opdgeo: {text}", file=sys.stderr, flush=True),
        each=report,
        **{name: wanted[name] for name in ("roles", "settings", "workers", "device", "cache")},
    )  # fmt: skip


def _plan(args: argparse.Namespace, checkpoints: list[str]) -> int:
    from opdgeo.survey.run import plan_text

    trajectory = args.command == "track"
    print(
        plan_text(
            args.base,
            checkpoints,
            trajectory=trajectory,
            roles=args.roles,
            settings=_settings(args),
            workers=args.workers,
        )
    )
    return DONE


def _survey_arguments(args: argparse.Namespace) -> dict:
    return dict(
        roles=args.roles,
        settings=_settings(args),
        engine=args.engine,
        ray_address=args.ray_address,
        workers=args.workers,
        device=args.device,
        cache=not args.no_cache,
        progress=sys.stderr.isatty(),
        out=args.out,
    )


def _finish(args: argparse.Namespace, result) -> int:  # type: ignore[no-untyped-def]
    from opdgeo.report.glossary import clean
    from opdgeo.report.terminal import print_summary

    result.save(args.out)
    print_summary(result.summary)
    if reused := result.run["reused"]:
        print(f"taken over from an earlier run into {args.out}: {', '.join(reused)}")
    pairing = result.run["pairing"]
    for label in ("base_only", "tuned_only", "unrecognised"):
        if names := pairing[label]:
            print(
                f"{label.replace('_', ' ')}: {len(names)} tensors not measured, such as {', '.join(map(clean, names[:3]))} (all in run.json)"
            )
    for note in dict.fromkeys(n for c in (result.run["base"], *result.run["checkpoints"]) for n in c.get("notes", [])):
        print(f"note: {clean(note)}")
    if not args.no_report:
        from opdgeo.report import write_report

        print(f"report: {write_report(args.out)}")
    print(f"data:   {args.out}/measurements.parquet, curves.parquet, summary.json, run.json")
    if result.skipped:
        print(
            f"opdgeo: {len(result.skipped)} matrices were not computed, first {clean(result.skipped[0])}; see `reason`",
            file=sys.stderr,
        )
        return INCOMPLETE
    return DONE


def _train(args: argparse.Namespace) -> int:
    from opdgeo.experiments.presets import make_teacher, train_config
    from opdgeo.training.distributed import is_main
    from opdgeo.training.models import resolve
    from opdgeo.training.train import train

    names = (
        "steps", "seed", "alpha", "token_share", "token_choice", "rollouts", "record_rollouts", "monitor", "channel", "constrain",
        "moments", "unconstrained", "vllm",
    )  # fmt: skip
    overrides = dict(_setting(text) for text in args.settings)
    overrides |= {name: value for name in names if (value := getattr(args, name)) is not None}
    config = train_config(args.paradigm, args.preset, origin=args.model, **overrides)
    out = args.out or Path(f"opdgeo-{args.paradigm}")
    if args.plan is not None:
        return _train_plan(config, args.plan or None)
    make_teacher(config, progress=sys.stderr.isatty())
    last = train(config, out, resume=args.resume, progress=sys.stderr.isatty())
    if not is_main():
        return DONE
    print(f"last checkpoint: {last}")
    print(f"measure it:      opdgeo track {resolve(config.origin)} {out}")
    return DONE


def _train_plan(config, hardware: str | None) -> int:  # type: ignore[no-untyped-def]
    from opdgeo.training import resources

    made = resources.plan(config, resources.hardware(hardware))
    print(resources.describe(made))
    resources.refuse_what_cannot_fit(made)
    return DONE


def _evaluate(args: argparse.Namespace) -> int:
    from opdgeo.training.benchmark import evaluate

    names = ("k", "limit", "temperature", "top_p", "max_tokens", "batch", "seed", "plain", "device")
    result = evaluate(
        args.model, args.problems, args.out, **{n: getattr(args, n) for n in names}, progress=sys.stderr.isatty()
    )
    low, high = result["interval"]
    print(
        f"avg@{args.k}: {100 * result['average']:.1f} %  (95 % interval over problems {100 * low:.1f}–{100 * high:.1f}), "
        f"{result['problems']} problems, {result['mean_tokens']:.0f} tokens a completion, {100 * result['cut']:.1f} % cut"
    )
    print(f"data: {args.out}/evaluation.json, completions.jsonl")
    return DONE


def _setting(text: str) -> tuple[str, object]:
    """NAME=VALUE; a value that is not JSON is a text."""
    name, equals, value = text.partition("=")
    if not (equals and name):
        raise ConfigError(f"--set is {text!r}; expected NAME=VALUE, such as --set micro_batch=2.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _reproduce(args: argparse.Namespace) -> int:
    from opdgeo.experiments.reproduce import reproduce
    from opdgeo.report.terminal import print_claims

    claims = reproduce(
        args.preset, args.out, seeds=args.seeds, workers=args.workers, study=args.study, rehearse=args.rehearse
    )
    print_claims(claims)
    print(f"report: {args.out / 'report.html'}")
    return DONE


def _signals(args: argparse.Namespace) -> int:
    from opdgeo.experiments.gradient_moments import signals
    from opdgeo.report import write_report
    from opdgeo.report.signals import print_signals

    names = ("preset", "task", "prompts", "generations", "roles", "layers", "top_k", "seed", "out")
    result = signals(
        args.checkpoints, args.teacher, progress=sys.stderr.isatty(), **{name: getattr(args, name) for name in names}
    )
    result.save(args.out)
    print_signals(result.summary)
    if not args.no_report:
        print(f"report: {write_report(args.out)}")
    print(f"data:   {args.out}/signals.parquet, signals_spectra.parquet, signals.json, run.json")
    return DONE


def _channel(args: argparse.Namespace) -> int:
    from opdgeo.report.terminal import print_channel
    from opdgeo.training.channel import Channel, parse_choice

    progress = None
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        progress = lambda matrices: track(matrices, "matrices", console=Console(stderr=True))  # noqa: E731
    channel = Channel.extract(args.base, args.tuned, parse_choice(args.k), args.side, args.roles, progress)
    path = channel.save(args.out)
    print_channel(channel.table())
    print(f"channel: {path}")
    try:
        print(f"adapter: {channel.to_adapter(args.base, args.out / 'adapter')}  (A = Vᵀ, B = 0, scale 1)")
    except ConfigError as error:
        print(f"no adapter: {error}")
    return DONE


def _cache(args: argparse.Namespace) -> int:
    from datetime import datetime

    from opdgeo.survey.cache import SpectrumCache

    cache = SpectrumCache()
    if args.action == "clear":
        print(f"{cache.folder}: {cache.clear() / 1e9:.2f} GB freed")
        return DONE
    entries = cache.entries()
    for path, size, used in entries:
        print(f"{size / 1e6:8.1f} MB  {datetime.fromtimestamp(used):%Y-%m-%d %H:%M}  {path.stem[:16]}")
    print(f"{cache.folder}: {len(entries)} spectra, {sum(e[1] for e in entries) / 1e9:.2f} of {cache.limit / 1e9:g} GB")
    return DONE


def _report(args: argparse.Namespace) -> int:
    from opdgeo.report import write_report

    for out in args.out:
        print(f"report: {write_report(out, figures=args.figures)}")
    if args.markdown:
        from opdgeo.report.markdown import write_markdown

        if len(args.out) != 1:
            raise ConfigError(f"--markdown was given with {len(args.out)} folders; expected one study.")
        print(f"text:   {write_markdown(args.out[0], args.markdown)}")
    return DONE


def main(argv: list[str] | None = None) -> NoReturn:
    """Run one command and exit with its status."""
    command_line = parser()
    args = command_line.parse_args(argv)
    if args.version:
        from opdgeo import __version__

        print(f"opdgeo {__version__}")
        sys.exit(DONE)
    if args.command is None:
        command_line.print_help()
        sys.exit(DONE)
    try:
        sys.exit(args.run(args))
    except OpdgeoError as error:
        print(f"opdgeo: {error}", file=sys.stderr)
        sys.exit(REFUSED)
    except KeyboardInterrupt:
        print("opdgeo: interrupted; nothing half-written was left", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
