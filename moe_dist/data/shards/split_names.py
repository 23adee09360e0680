"""The names whose hashes divide the samples of one file or folder among the splits."""

from __future__ import annotations

from moe_dist.core.errors import UserError
from moe_dist.data.shards.sample_groups import SampleFiles
from moe_dist.data.shards.samples import IMAGE_SUFFIXES, BadSample, LostSample, decode_sample


def split_name(sample: SampleFiles, *, line: bool) -> str:
    """Return the name whose hash decides which split a sample belongs to.

    For an instruction without a picture, the name is the prompt. Therefore no prompt is in two splits. For any other
    text in a JSONL file, the name is the text. For all other samples, the name is the sample's key.
    line: whether the sample is a line of a JSONL file.
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
