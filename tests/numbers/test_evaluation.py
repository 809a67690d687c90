"""What evaluation compares of logits too many to hold, and who waits for a model that takes long to build."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from checkpoints.checkpoint_ranks import run
from small_sessions import at, configured, session

from ulysses_exp.config import Config
from ulysses_exp.launch import heartbeat
from ulysses_exp.rank import session as sessions
from ulysses_exp.rank.evaluation import logits
from ulysses_exp.stages.eval import rank as evaluation


def at_places(config: Config, folder: Path) -> dict[str, object]:
    with session(at(config, "sp2-dp1-z3"), folder) as opened, torch.no_grad():
        opened.engine.eval()
        whole = opened.batches.micro_batch("eval", [0], whole=True)
        shared = opened.batches.micro_batch("eval", [0])
        every = evaluation._logit_difference(opened)
        tokens, vocabulary = whole.input_ids.shape[1], 256
        evaluation.LOGITS_BYTES = 4 * vocabulary * 10  # five of this rank's sixteen tokens
        places = evaluation._places(opened, tokens, vocabulary)
        assert places is not None
        start = opened.batches.slice.start
        same = [
            torch.equal(logits(opened, whole, True)[:, places + start], logits(opened, whole, True, places + start)),
            torch.equal(logits(opened, shared, False)[:, places], logits(opened, shared, False, places)),
        ]
        some = evaluation._logit_difference(opened)
        # a mode that is wrong shows at the places that are looked at
        embedding = opened.engine.module.get_input_embeddings()
        hook = embedding.register_forward_hook(lambda _, inputs, out: out + 0.01 * (inputs[0].shape[1] < tokens))
        wrong = evaluation._logit_difference(opened)
        hook.remove()
        return {"places": places.tolist(), "same": same, "every": every, "some": some, "wrong": wrong}


def test_logits_that_are_too_many_are_compared_at_some_tokens(tmp_path):
    for found in run(2, at_places, configured("data.padding=left"), tmp_path):
        assert found["places"] == [0, 3, 7, 11, 15] and all(found["same"]), found
        assert found["some"] <= found["every"] < 1e-5 < 1e-3 < found["wrong"], found


def test_ranks_wait_for_rank_0_with_signs_of_life(tmp_path):
    """Building takes longer than any collective waits; who waits is not taken for one that stands still."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "meeting"), 1), rank=0, world_size=1)
    try:
        heartbeat.start(tmp_path, 1)
        waiting = threading.Thread(target=sessions._wait_for_rank_0, args=(1,), daemon=True)
        waiting.start()
        time.sleep(0.3)
        before = heartbeat.last(tmp_path, 1)
        time.sleep(0.3)
        after = heartbeat.last(tmp_path, 1)
        assert waiting.is_alive() and before is not None and after is not None and after.count > before.count
        sessions._wait_for_rank_0(0)
        waiting.join(5)
        assert not waiting.is_alive()
    finally:
        heartbeat._writer = None
        dist.destroy_process_group()
