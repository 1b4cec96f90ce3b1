"""All conversations at once: a thread for each that is under way, one reply after another in each of them.

A reply is in the journal before the next question is asked. Two conversations that begin alike share what they share:
what is being asked already is waited for, not asked again.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from eagle.data.cleaning import Dropped
from eagle.data.loss_mask import Encoder
from eagle.data.prompts import encode_messages, text_of_reply, without_heading
from eagle.data.reasoning import with_its_beginning
from eagle.progress import progress_bar
from eagle.regenerate.dialogue import SAMPLED, Dialogue, Walk, walk_through
from eagle.regenerate.journal import CUT, FILTERED, LENGTH, REJECTED, STOP, TOO_LONG, Answer, Journal
from eagle.regenerate.served import Engine, Question, Said
from eagle.regenerate.transport import Failed, Stopped

#: So many tokens more than a text has here, or a fiftieth, a server may count in it: tokenised anew, it may be fewer.
_MORE = 2


@dataclass(slots=True)
class Counts:
    """What one run did. failures: of every request that failed, by its key, what was said."""

    asked: int = 0
    tokens: int = 0
    seconds: float = 0.0
    failures: dict[bytes, str] = field(default_factory=dict)


class Asking:
    """Asks an engine what a journal does not hold yet.

    lock: held while anything reads records or uses the tokenizer, neither of which is made for several threads.
    """

    def __init__(
        self,
        engine: Engine,
        encoder: Encoder,
        journal: Journal,
        max_new_tokens: int,
        seed: int,
        stop: Collection[int],
    ) -> None:
        self.engine, self.encoder, self.journal = engine, encoder, journal
        self.counts, self.lock = Counts(), threading.Lock()
        self._max_new_tokens, self._seed, self._stop = max_new_tokens, seed, frozenset(stop)
        self._asked: dict[bytes, Future[Answer | None]] = {}
        self._new: set[bytes] = set()
        self._count_lock = threading.Lock()

    def run(
        self, conversations: Sequence[int], dialogue: Callable[[int], Dialogue], questions: int, threads: int
    ) -> None:
        """Every conversation to its end. questions: how many there are in all of them.

        Raises: what any of them raises that is not its own failure; what has come by then is in the journal.
        """
        started, left, errors = time.monotonic(), iter(conversations), list[BaseException]()
        bar: Any = progress_bar(questions, "req", desc="regenerating", initial=min(len(self.journal), questions))

        def answer(walk: Walk) -> Answer | None:
            found, is_new = self.answer(walk)
            with self._count_lock:
                if is_new:
                    bar.update()
                    rate = self.counts.tokens / max(1e-9, time.monotonic() - started)
                    bar.set_postfix_str(f"{rate:,.0f} tokens/s{self.engine.state()}", refresh=False)
            return found

        def work() -> None:
            try:
                while not errors:
                    with self.lock:
                        index = next(left, None)
                        if index is None:
                            return
                        asked = dialogue(index)
                    walk = walk_through(asked, answer)
                    with self._count_lock:  # what is never asked is no part of what is to come
                        bar.total -= len(asked.questions) - len(walk.finishes) - bool(walk.end and walk.end != LENGTH)
            except Stopped:
                pass
            except BaseException as error:
                errors.append(error)
                self.engine.stop()

        workers = [threading.Thread(target=work, daemon=True) for _ in range(min(threads, len(conversations)))]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                while worker.is_alive():
                    worker.join(0.2)  # not for ever at once: Ctrl-C is heard in between
                    if errors:
                        break
        except BaseException:
            errors.append(KeyboardInterrupt())
            self.engine.stop()
            raise
        finally:
            self.counts.seconds = time.monotonic() - started
            bar.close()
        if errors:
            raise errors[0]

    def answer(self, walk: Walk) -> tuple[Answer | None, bool]:
        """The reply to the question at a walk's end, None where the request failed; and whether it was asked now."""
        key = walk.key()
        with self._count_lock:
            found = self.journal.get(key)
            if found is not None and (key in self._new or found.is_final(self.engine.context)):
                return found, False
            future = self._asked.get(key)
            is_mine = future is None
            if future is None:
                future = self._asked[key] = Future()
        if not is_mine:
            return future.result(), False
        try:
            answer = self._ask(walk)
            self.journal.put(key, answer)
        except Failed as failed:
            with self._count_lock:
                self.counts.failures[key] = str(failed)
            future.set_result(None)  # stays: what failed however often it was tried is not tried again by the next one
            return None, True
        except BaseException as error:
            future.set_exception(error if isinstance(error, Exception) else Stopped())
            raise
        future.set_result(answer)
        with self._count_lock:
            if answer.context is not None:
                self._new.add(key)
            self._asked.pop(key)
        return answer, True

    def _ask(self, walk: Walk) -> Answer:
        try:
            with self.lock:
                prompt = encode_messages(walk.messages, self.encoder)
        except Dropped:
            return Answer(REJECTED)
        room = min(self._max_new_tokens, self.engine.context - len(prompt))
        if room < 1:
            return Answer(TOO_LONG, context=self.engine.context)
        said = self.engine.ask(Question(walk.messages, prompt, room, self._seed_of(walk.key())))
        with self._count_lock:
            self.counts.asked += 1
            self.counts.tokens += said.tokens
        context = said.context
        if said.finish == LENGTH and context is None and self.engine.context - len(prompt) < self._max_new_tokens:
            context = self.engine.context
        if said.finish in (TOO_LONG, CUT, FILTERED):
            return Answer(said.finish, context=context)
        if self.engine.tokens_from != SAMPLED or said.ids is None:
            with self.lock:
                return Answer(said.finish, self._text(said, walk), context=context)
        with self.lock:
            text = text_of_reply(said.ids, prompt, self.encoder, self._stop)
        # A reply that has both the last token it may have and an end of turn in it is whole.
        finish = STOP if said.ids and said.ids[-1] in self._stop else said.finish
        behind = walk.behind(prompt)
        context = context if finish == LENGTH else None
        return Answer(finish, text, said.ids, prompt[behind:], behind, context)

    def _text(self, said: Said, walk: Walk) -> str:
        """Of a reply whose text alone is known.

        One that was cut off may be reasoning that the prompt has begun; or its answer, where a server keeps the
        reasoning to itself: then it counts far more tokens than the text has.
        """
        text = without_heading(said.text, self.encoder)
        if said.finish != LENGTH or said.is_answer or not said.tokens:
            return text
        whole = with_its_beginning(text, self.encoder.prompt(walk.messages))
        if whole == text:
            return text
        try:
            own = len(self.encoder.tokenize(text)[0])
        except Dropped:  # it is no use anyway
            return text
        return whole if said.tokens <= own + max(_MORE, own // 50) else text

    def _seed_of(self, key: bytes) -> int:
        """A request's own seed, so that its reply does not depend on which others there are."""
        digest = hashlib.sha256(self._seed.to_bytes(16, "big", signed=True) + key).digest()
        return int.from_bytes(digest[:4], "big") >> 1
