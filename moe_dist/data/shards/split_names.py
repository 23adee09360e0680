"""The names whose hashes divide the samples of one file or folder among the splits."""

from __future__ import annotations

from moe_dist.core.errors import UserError
from moe_dist.data.shards.sample_groups import SampleFiles
from moe_dist.data.shards.samples import IMAGE_SUFFIXES, BadSample, LostSample, decode_sample


def split_name(sample: SampleFiles, *, line: bool) -> str:
    """Return the name whose hash decides to which split a sample belongs, if there are no folders for the splits.

    It is the prompt of an instruction without a picture, so that no prompt is in two splits. Other samples are divided
    by their keys; a line of a JSONL file (`line`), by its text.
    """
    if any(suffix in IMAGE_SUFFIXES for suffix in sample.files) or "json" not in sample.files:
        return sample.key
    try:
        text = decode_sample(sample, "")
    except (BadSample, LostSample, UserError):  # it is reported when its split is read
        return sample.key
    if text.instruction is not None:
        return text.instruction.prompt
    return text.captions[0] if line else sample.key
