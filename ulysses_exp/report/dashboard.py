"""A saved W&B workspace with the panels of the report, as code.

`python -m ulysses_exp.report.dashboard --entity ENTITY --project PROJECT` saves it to the W&B server that
one is logged in to; with `--dry-run FILE` it is written to a file instead, without account or network.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

try:
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces
    from wandb_workspaces.expr import Config, Metric, Ordering
except ImportError:
    sys.exit("the dashboard needs wandb-workspaces: pip install 'ulysses-exp[dashboard]'")

from ulysses_exp.report.pictures import names
from ulysses_exp.tracking.server import PROBE_S, foreign_settings, server, unreachable

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2.interface import PanelTypes

NAME = "Ulysses: layouts compared"


def workspace(entity: str, project: str) -> workspaces.Workspace:
    """The workspace, not yet saved: runs grouped by experiment, figures by layout without any clicking."""
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[
            _section("Throughput and memory by layout", [
                _bars("Throughput", "results/train/tokens_per_second", "tokens per second, all ranks"),
                _bars("Step time", "results/train/step_time_s/median", "seconds, median"),
                _bars("Peak memory", "results/train/peak_memory_bytes/max", "bytes, worst rank"),
                _bars("All-to-all", "results/train/communication/all_to_all_bytes_per_step", "bytes per step"),
                _scatter("Throughput by sequence length", "seq_len", "results/train/tokens_per_second"),
                _scatter("Peak memory by sp", "sp_size", "results/train/peak_memory_bytes/max"),
            ]),
            _section("Training: one line, whatever the layout", [
                _lines("Loss", "train/loss", "nats per token"),
                _lines("Gradient norm", "train/grad_norm", "L2 norm"),
                _lines("Learning rate", "train/learning_rate", ""),
                _lines("Throughput", "perf/tokens_per_second", "tokens per second, all ranks"),
                _lines("Step time", "perf/step_time_s", "seconds"),
                _lines("Peak memory", "memory/peak_bytes_max", "bytes, worst rank"),
                _lines("Arithmetic", "perf/tflops_per_rank", "model TFLOP/s per rank"),
                _lines("MFU", "perf/mfu", "share of the device's peak"),
            ]),
            _section("Evaluation: SP bypass beside SP", [
                panels.BarPlot(
                    title="Loss", title_x="nats per token",
                    metrics=["results/eval/bypass/loss", "results/eval/sp/loss"], groupby=panels.Config("layout"),
                ),
                panels.BarPlot(
                    title="All-to-all calls",
                    metrics=["results/eval/bypass/all_to_all_calls", "results/eval/sp/all_to_all_calls"],
                    groupby=panels.Config("layout"),
                ),
                _bars("Largest difference of a logit", "results/eval/max_abs_logit_diff", "absolute"),
            ]),
            _section("Reload across layouts", [
                panels.WeavePanelSummaryTable(table_name="reload"),
                _bars("Seconds", "results/reload/seconds", "seconds"),
            ]),
            _section("Parity and plan", [
                panels.BarPlot(
                    title="Largest relative difference to one process",
                    metrics=[f"results/parity/max_rel_{kind}_diff" for kind in ("loss", "grad_norm", "weight")],
                    groupby=panels.Config("layout"),
                ),
                _bars("Planned memory", "results/plan/peak_memory_bytes_per_rank/total", "bytes per rank"),
                panels.RunComparer(diff_only="split"),
            ]),
            _section("Reports", [
                panels.MediaBrowser(media_keys=[f"report/{name}" for name in names()], num_columns=2),
            ]),
        ],
        settings=workspaces.WorkspaceSettings(x_axis="step", max_runs=50, group_by_prefix="first"),
        runset_settings=workspaces.RunsetSettings(
            groupby=[Metric("Group")],
            order=[Ordering(Config("sp_size")), Ordering(Config("zero_stage"))],
            pinned_columns=[
                "run:displayName", "config:layout", "config:seq_len", "summary:results/train/tokens_per_second",
                "summary:results/train/peak_memory_bytes/max", "summary:results/status",
            ],
        ),
    )  # fmt: skip


def _section(name: str, content: list[PanelTypes]) -> workspaces.Section:
    return workspaces.Section(name=name, panels=content, is_open=True)


def _bars(title: str, key: str, unit: str) -> panels.BarPlot:
    return panels.BarPlot(
        title=title, metrics=[key], title_x=unit, groupby=panels.Config("layout"), groupby_aggfunc="mean"
    )


def _lines(title: str, key: str, unit: str) -> panels.LinePlot:
    return panels.LinePlot(
        title=title,
        x="step",
        y=[key],
        title_x="optimizer step",
        title_y=unit,
        groupby=panels.Config("layout"),
        smoothing_type="none",
    )


def _scatter(title: str, setting: str, key: str) -> panels.ScatterPlot:
    return panels.ScatterPlot(
        title=title,
        x=panels.Config(setting),
        y=panels.SummaryMetric(key),
        z=panels.Config("sp_size"),
        log_x=setting == "seq_len",
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ulysses_exp.report.dashboard", description=__doc__.splitlines()[0])
    parser.add_argument("--entity", required=True, help="user or team")
    parser.add_argument("--project", default="ulysses-exp")
    parser.add_argument("--dry-run", type=Path, metavar="FILE", help="write the workspace as JSON, save nothing")
    arguments = parser.parse_args()
    made = workspace(arguments.entity, arguments.project)
    if arguments.dry_run:
        arguments.dry_run.write_text(made._to_model().model_dump_json(by_alias=True, indent=1))
        print(f"written, not saved: {arguments.dry_run}")
        return 0
    import wandb

    base_url = server()
    wandb.setup(wandb.Settings(silent=True, base_url=base_url))
    problem = foreign_settings(base_url) or unreachable(base_url, PROBE_S)
    if problem is not None:
        print(f"W&B is not reachable ({problem}); nothing was saved", file=sys.stderr)
        return 1
    print(made.save().url)  # type: ignore[no-untyped-call]
    return 0


if __name__ == "__main__":
    sys.exit(main())
