"""Where a step's time goes, by a trace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pjax import LLM, SamplingParams
from pjax.cli.breakdown import PARTS, break_down, busy_time, own_times, parts_of
from tests.tiny import write_model


def test_time_inside_another_operation_counts_once() -> None:
    events = [(0.0, 10.0, "while"), (1.0, 4.0, "a"), (2.0, 3.0, "b"), (4.0, 9.0, "a"), (10.0, 12.0, "b"), (12.0, 12.0, "c")]
    assert own_times(events) == {"while": 2.0, "a": 7.0, "b": 3.0, "c": 0.0}
    assert own_times([]) == {}


def test_overlapping_threads_are_busy_once() -> None:
    assert busy_time([(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5), (7.0, 8.0)]) == 6.0
    assert busy_time([]) == 0.0


HLO = """HloModule jit_decode_4

FileNames
1 "/x/pjax/models/llama.py"
2 "/x/pjax/runner/forward.py"
3 "/x/pjax/sampling/sampler.py"
4 "/x/pjax/pallas_kernels/kv_write/xla.py"

FileLocations
1 {file_name_id=2 function_name_id=1 line=1}
2 {file_name_id=1 function_name_id=1 line=2}
3 {file_name_id=3 function_name_id=1 line=3}
4 {file_name_id=4 function_name_id=1 line=4}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=2}
4 {file_location_id=4 parent_frame_id=3}

%fused_computation (p: f32[4]) -> f32[4] {
  ROOT %dot_general.1 = f32[4] dot(%p, %p), metadata={op_name="jit(step)/dot_general" stack_frame_id=2}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %fusion.1 = f32[4] fusion(%p), kind=kCustom, calls=%fused_computation, metadata={op_name="a" stack_frame_id=2}
  %tanh.2 = f32[4] tanh(%p), metadata={op_name="dot(it is not)" stack_frame_id=2}
  %dot.3 = f32[4] dot(%p, %p), metadata={op_name="b" stack_frame_id=3}
  %dot.4 = f32[4] dot(%p, %p), metadata={op_name="b" stack_frame_id=4}
  %copy.5 = f32[4] copy(%p)
  ROOT %custom-call.6 = f32[4] custom-call(%p), custom_call_target="__cublas$gemm", metadata={op_name="b" stack_frame_id=1}
}
"""


def test_instructions_belong_to_the_files_that_they_came_from() -> None:
    assert parts_of(HLO) == {
        "dot_general.1": "products",
        "fusion.1": "products",
        "tanh.2": "rest",
        "dot.3": "sampling",
        "dot.4": "attention",
        "copy.5": "rest",
        "custom-call.6": "products",
    }


@pytest.mark.slow
def test_a_real_trace(tmp_path: Path) -> None:
    """Every step is found by its name, and the parts of each are all of it."""
    llm = LLM(
        write_model(tmp_path / "tiny"),
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        num_pages=32,
        warmup="all",
        progress=False,
    )

    def run() -> float:
        llm.generate([[1, 2, 3, 4]] * 4, SamplingParams(temperature=1, seed=1, max_tokens=5, ignore_eos=True), use_tqdm=False)
        return 100.0  # seconds, far more than it takes

    run()
    found = break_down(llm, run)
    host = found.pop("host")
    found.pop("write_blocks_32", None)  # in steps that need a page more
    forward = {name for name in found if not name.startswith("sample_")}
    assert forward <= {bucket.name for bucket in llm.engine.runner.buckets} and set(found) - forward == {"sample_4"}
    assert found["decode_4"]["steps"] == 4 and found["sample_4"]["steps"] == 5
    for name, program in found.items():
        assert sum(program[part] for part in PARTS) == pytest.approx(100) and program["ms"] > 0
        found_parts = {part for part in PARTS if program[part] > 0}
        assert found_parts == {"attention", "products", "rest"} if name in forward else found_parts >= {"sampling"}
    assert 5 * host["ms"] + sum(program["ms"] * program["steps"] for program in found.values()) == pytest.approx(1e5)
    text = llm.engine.runner.compiled_texts()["decode_4"]
    parts = parts_of(text)
    kernels = dict(re.findall(r"^\s*(?:ROOT )?%?([\w.-]+) = .*custom_call_target=\"(pjax_\w+)", text, re.MULTILINE))
    assert {(target, parts[name]) for name, target in kernels.items()} <= {
        ("pjax_product", "products"),
        ("pjax_paged_attention", "attention"),
        ("pjax_kv_write", "attention"),
    }
    assert "pjax_product" in kernels.values()
    sampling = parts_of(llm.engine.runner.compiled_texts()["sample_4"])
    assert {sampling[name] for name in sampling if "threefry" in name} <= {"sampling"}
