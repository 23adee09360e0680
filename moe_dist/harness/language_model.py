"""The interface of lm_eval for language models, implemented by a team of ranks.

This is the only file that imports lm_eval at its top. Import this file inside functions only, after require_extra.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moe_dist.core.errors import UserError
from moe_dist.core.strict import validate
from moe_dist.generate.sampling import Sampling
from moe_dist.harness.answering import Ids, Score
from moe_dist.harness.stopping import StopSettings
from moe_dist.harness.task_text import Messages, TaskText
from moe_dist.harness.team import Team

MAX_GENERATED = 256  # tokens, if a task does not say otherwise, as in lm_eval


class HarnessModel(TemplateLM):
    """A language model for lm_eval. It gets all requests on rank 0 and asks the team for the answers.

    context: the maximum number of tokens that the model reads.
    """

    def __init__(self, team: Team, text: TaskText, context: int) -> None:
        super().__init__()
        self._team, self._text, self._context = team, text, context

    # ---------------------------------------------------------------------------------------------------------- text

    @property
    def eot_token_id(self) -> int:
        """The id of the token that precedes a text without a context. lm_eval prescribes the property's name."""
        return self._text.prefix

    @property
    def tokenizer_name(self) -> str:
        return self._text.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._text.encode(string, add_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._text.template if chat_template else None

    def apply_chat_template(self, chat_history: Messages, add_generation_prompt: bool = True) -> str:
        return self._text.chat(chat_history, prompt=add_generation_prompt)

    # ------------------------------------------------------------------------------------------------------- requests

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Score]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[Score]:
        for (_, continuation), before, ids in requests:
            if not before or not 1 <= len(ids) <= self._context:
                raise UserError(
                    f"the tokenizer makes {len(before)} tokens of the context and {len(ids)} of the continuation "
                    f"'{continuation[:60]}' of a task, but needs at least 1 and 1, and at most {self._context} "
                    "(data.sequence_length) of the continuation"
                )
        return self._team.ask("score", [(before, ids) for _, before, ids in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        windows: list[tuple[Ids, Ids]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            cut = get_rolling_token_windows(ids, self.prefix_token_id, max_seq_len=self._context, context_len=1)
            windows += map(make_disjoint_window, cut)
            owners += [number] * (len(windows) - len(owners))
        sums = [0.0] * len(requests)
        for number, (log_likelihood, _) in zip(owners, self._team.ask("score", windows), strict=True):
            sums[number] += log_likelihood
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        by_settings: dict[tuple[StopSettings, Sampling], list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            by_settings[self._settings(request.args[1])].append(number)
        texts = [""] * len(requests)
        for (stop, sampling), numbers in by_settings.items():
            prompts = [self.tok_encode(requests[number].args[0]) or [self.prefix_token_id] for number in numbers]
            for number, ids in zip(numbers, self._team.ask("complete", prompts, stop, sampling), strict=True):
                texts[number] = postprocess_generated_text(self._text.decode(ids), list(stop.until), None)
        return texts

    def _settings(self, given: dict[str, Any]) -> tuple[StopSettings, Sampling]:
        """Return the settings of a request. Raises UserError naming a setting that is not supported."""
        rest: dict[str, Any] = dict(normalize_gen_kwargs(given, MAX_GENERATED))
        until = handle_stop_sequences(rest.pop("until"), self._text.eos)
        stop = StopSettings(tuple(until), rest.pop("max_gen_toks"))
        sampled = rest.pop("do_sample")
        if not 1 <= stop.max_tokens < self._context:
            raise UserError(
                f"a task asks for {stop.max_tokens} tokens (max_gen_toks), but must ask for at least 1 and fewer than "
                f"the {self._context} tokens of a sequence (data.sequence_length)"
            )
        chosen = {name: float(rest.pop(name)) for name in ("temperature", "top_p") if name in rest}
        if not sampled:
            rest.pop("top_k", None)  # it does not change the most likely token
            chosen = {"temperature": 0.0}
        return stop, validate(Sampling, chosen | rest, "generation_kwargs of a task")
