"""A follower that takes the weights of a serving engine from version to version of a chain, while it answers.

Which version the engine has stands in what it says of its weights, given with the step itself.  So a follower that was
killed at any moment, or another one, goes on where it was.
"""

from __future__ import annotations

import re

from shiradelta.chain.chain import Chain, Path_
from shiradelta.chain.follow import CHAIN, Follower, Hook, version_in
from shiradelta.chain.inflight import POLICIES
from shiradelta.chain.rows import Anchor, Step
from shiradelta.chain.stores import Store
from shiradelta.errors import ChainError, TargetError
from shiradelta.io.reader import Delta
from shiradelta.serving.session import SwapRequest
from shiradelta.serving.vllm_client import VLLM
from shiradelta.util.arguments import BOOL, CALL, TEXT, WHOLE, ArgumentKind, checked

ENGINE = ArgumentKind("a VLLMServer or a VLLMOffline", lambda value: isinstance(value, VLLM))
_WHERE = "the engine"


class EngineFollower(Follower):
    """Takes the weights of a vLLM engine from version to version, each step between two batches.

    `/weight_info` then says `CHAIN:VERSION` as the policy, and so does each request that ends.  The last step can be
    taken back; when the next one comes, what is on the weights becomes the base of the workers' session.  Other
    adapters must not be loaded meanwhile.

    Args:
        chain: the chain, its folder, or an open store.
        engine: the engine, after its `init`.
        version: the version that the engine was started with; it counts until the first step, after which the engine
            says what it is.
        policy: "finish" lets requests that are being answered end before a step, "abort" ends them.  There is none
            that lets them go on with other weights.
        send: send the workers a step's bytes; by default they read its file, at the path that it has here.
        before: called with a step before it is applied; an error that it raises leaves the weights as they are.
        after: called with a step when it has been applied.

    Raises:
        ArgumentError: there is no such policy.
        ChainError: there is no such chain.
    """

    @checked(chain=CHAIN, engine=ENGINE, version=WHOLE, policy=TEXT, send=BOOL, before=CALL, after=CALL)
    def __init__(
        self,
        chain: Chain | Path_ | Store,
        engine: VLLM,
        version: int,
        *,
        policy: str = "finish",
        send: bool = False,
        before: Hook | None = None,
        after: Hook | None = None,
    ) -> None:
        super().__init__(chain, before, after)
        self._engine, self._start, self._send = engine, int(version), send
        self._running = "abort" if POLICIES.find(policy).aborts else "wait"
        self._is_settled = False

    @property
    def version(self) -> int:
        """The version that the engine has.

        Raises:
            ChainError: it has one of another chain, or other adapters are active.
            TargetError: it does not answer.
        """
        return self._known()[0]

    def _known(self) -> tuple[int, str | None, int]:
        """(the version, the step that can be taken back, the version before it)."""
        said = self._engine.known()
        if said.adapters is None:
            raise ChainError("not_on_chain", _WHERE, f"it says that its weights are {said.policy}")
        version = self._start if said.policy is None else version_in(said.policy, self.chain.manifest.id, _WHERE)
        if not said.adapters:
            return version, None, version
        found = re.fullmatch(rf"step ([0-9]+) -> {version}", next(iter(said.adapters)))
        if found is None or len(said.adapters) > 1:
            raise ChainError("not_on_chain", _WHERE, f"{', '.join(said.adapters)} is active on it")
        return version, found[0], int(found[1])

    def follow(self, to: int | None = None) -> list[Step]:
        """As `Follower.follow`.  The first call sends a request though there is no step.

        A follower before this one may have ended with the engine paused, with its caches of older weights, or with
        weights that the engine does not name yet.
        """
        try:
            done = super().follow(to)
        except TargetError as error:
            if self._is_settled or not _is_refusal(error):
                raise
            self._settle()
            return self.follow(to)
        if not (done or self._is_settled) and self._settle():
            return self.follow(to)
        self._is_settled = True
        return done

    def _settle(self) -> bool:
        """Has the engine name the weights that it has; True if it named others.

        A follower that is killed between a request and its version leaves a step done, or taken back, that the engine
        does not name.  A worker refuses to make active what it has not loaded, so its refusals tell which it was.
        """
        here, last, _ = self._known()
        steps = self.chain.manifest.steps
        names = [(str(step), step.stop) for step in steps if step.start == here]
        if last is not None:
            names.append((last, here))
        for name, version in names:
            try:
                self._update(SwapRequest(active={name: 1.0}), version)
            except TargetError as error:
                if not _is_refusal(error):
                    raise
            else:
                self._is_settled = True
                return version != here
        if last is None:
            self._update(SwapRequest(active={}), here)
        else:  # it was taken back: it is done again, which the workers refuse on any other weights
            again = next((step for step in steps if str(step) == last), None)
            if again is None:
                raise ChainError("not_on_chain", _WHERE, f"it names {last}, which the chain no longer has")
            with self.chain.open_step(again) as delta:
                self._update(self._request(again, delta), here)
        self._is_settled = True
        return False

    def _begin(self, anchor: Anchor) -> None:
        raise TargetError("an engine has a version from its beginning; start it with a newer one")

    def _apply(self, step: Step, delta: Delta) -> None:
        request = self._request(step, delta) if len(delta) else SwapRequest()  # otherwise there is nothing to load
        request.rebase = True
        self._update(request, step.stop)

    def _request(self, step: Step, delta: Delta) -> SwapRequest:
        name, file = str(step), str(delta.file)
        if not self._send:
            return SwapRequest(load={name: file}, active={name: 1.0})
        with open(file, "rb") as stream:
            return SwapRequest(data={name: stream.read()}, active={name: 1.0})

    def _take_back(self, version: int) -> None:
        here, step, before = self._known()
        if step is None:
            raise ChainError("not_kept", f"{_WHERE} to version {version}", f"its base is version {here}")
        self._update(SwapRequest(active={}, unload=[step]), before)

    def _update(self, request: SwapRequest, version: int) -> None:
        self._engine.update(request, policy=self._label(version), running=self._running)


def _is_refusal(error: TargetError) -> bool:
    """Whether an update was refused, and nothing has changed: not if there was no answer, or a later step failed."""
    return not isinstance(error.__cause__, TargetError)
