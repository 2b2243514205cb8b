"""Every error that tl_em raises on purpose: what was observed, why it matters, the call that fixes it.

    TlEmError
    ├── HookError
    │   ├── UnknownHookError            a hook name (or site) that the model does not have
    │   ├── HookNotFiredError           a hook was attached, a full forward ran, it never fired
    │   └── NotAdditiveError            block outputs do not add up, so "every write" is undefined
    ├── PromptError
    │   ├── EmptyContrastError          a class of a contrast set is empty, or both classes are the same
    │   ├── UnknownTokenError           a prompt tokenizes to the unknown token
    │   ├── PromptTooLongError          a prompt is longer than the model's context
    │   └── PositionError               a position that this prompt does not have
    ├── ModelError
    │   ├── ModelNotFoundError          no such directory, organism or hub id
    │   ├── PairMismatchError           base and tuned differ in tokenizer or shape
    │   ├── WeightEditError             an edit of this model's weights would not equal the edit of its activations
    │   └── NonFiniteError              NaN or infinity in weights, activations or a direction
    ├── DirectionError
    │   ├── WidthError                  a vector whose width is not the model's d_model
    │   ├── ZeroDirectionError          a direction of length 0 has no unit vector
    │   ├── NoGapError                  the direction does not separate its own contrast set
    │   ├── NoCandidateError            every candidate of a selection was rejected
    │   ├── NotReachedError             no strength of an intervention reaches the wanted push
    │   ├── ProvenanceError             a direction met a model that it was not made on
    │   └── DictionaryFitError          a dictionary does not describe the activations that it would be looked up on
    ├── FileError
    │   ├── CorruptFileError            a file that is truncated, or not what it says
    │   └── OutputError                 a path that cannot be written
    ├── StudyError                      cells of a study failed; the finished ones are kept
    ├── JudgeError                      a judge elsewhere gave no answer; what it gave before is kept
    ├── ServiceError                    a service elsewhere refused, or gave no answer
    ├── InUseError                      another thread has a block open on this model, or waits for this one
    └── UsageError                      arguments that contradict each other
        ├── PlanError                   an audit that is not the one that was planned
        └── GraphTooLargeError          an attribution graph that would not fit into the memory that it may take

And eight warnings, all UserWarnings:

    AdapterBaseWarning                  an adapter on a base that is called otherwise than the one it was trained on
    CacheWarning                        generation cannot use the key-value cache, and reads the whole text every step
    DictionaryModelWarning              a dictionary met a model that is called otherwise than the one it was made on
    JudgeWarning                        a judge's scores are read from its words, for want of log-probabilities
    HiddenSteerWarning                  an ablation to zero that removes a mean far from zero
    OpenAddressWarning                  a model is served where other machines can ask it
    UnprovenWarning                     a text beyond the longest on which a model was compared with its source
    NuisanceWarning                     classes of a contrast set that differ in length, and so in more than the concept
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TlEmError(Exception):
    """Root of the tree: ``except em.TlEmError`` catches everything that tl_em raises on purpose."""


class HookError(TlEmError):
    """Something is wrong with a hook point."""


class UnknownHookError(HookError, LookupError):
    """A hook name or site that the model does not have."""


class HookNotFiredError(HookError, RuntimeError):
    """A hook was attached and a full forward pass ended without it having fired."""


class NotAdditiveError(HookError, RuntimeError):
    """No hook points were found at which a block's writes add up to its change of the residual stream."""


class PromptError(TlEmError, ValueError):
    """Something is wrong with a prompt or a set of prompts."""


class EmptyContrastError(PromptError):
    """A contrast set with an empty class, or with two classes that are the same prompts."""


class UnknownTokenError(PromptError):
    """A prompt tokenizes to the unknown token, so the model would read something else."""


class PromptTooLongError(PromptError):
    """A prompt is longer than the model's context."""


class PositionError(PromptError):
    """A token position that this prompt does not have."""


class ModelError(TlEmError, ValueError):
    """Something is wrong with a model."""


class ModelNotFoundError(ModelError, LookupError):
    """No model under this name: neither an organism, nor a local directory, nor a cached hub id."""


class PairMismatchError(ModelError):
    """Base and tuned cannot be compared: their tokenizers or their shapes differ."""


class WeightEditError(ModelError):
    """An edit of the weights that would not do what the edit of the activations does (tied weights, post-norms)."""


class NonFiniteError(ModelError):
    """NaN or infinity where a finite number is needed."""


class DirectionError(TlEmError, ValueError):
    """Something is wrong with a direction."""


class WidthError(DirectionError):
    """A vector whose width is not the model's ``d_model``."""


class ZeroDirectionError(DirectionError):
    """A direction of length zero."""


class NoGapError(DirectionError):
    """The interval of a direction's own gap includes 0, so nothing can be measured in units of it."""


class NoCandidateError(DirectionError):
    """Every candidate of a selection was rejected."""


class NotReachedError(DirectionError):
    """No strength of an intervention reaches the wanted KL."""


class ProvenanceError(DirectionError):
    """A direction met a model that it was not made on."""


class DictionaryFitError(DirectionError):
    """A dictionary explains too little of the activations, or loses too much of the model, to be looked up on it."""


class FileError(TlEmError, OSError):
    """Something is wrong with a file."""


class CorruptFileError(FileError):
    """A file that is truncated or does not hold what its name says."""


class OutputError(FileError):
    """A path that cannot be written."""


class StudyError(TlEmError, RuntimeError):
    """Cells of a study failed; the finished ones are kept. ``failed`` holds the others, with their tracebacks."""

    def __init__(self, message: str, failed: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.failed = tuple(failed)


class JudgeError(TlEmError, RuntimeError):
    """A judge that is asked over a network gave no answer; the answers that it gave are kept."""


class ServiceError(TlEmError, RuntimeError):
    """A service that is asked over a network refused, or gave no answer."""


class InUseError(TlEmError, RuntimeError):
    """Another thread uses this model, and it is not known that it will ever be done."""


class UsageError(TlEmError, ValueError):
    """Arguments that contradict each other."""


class PlanError(UsageError):
    """An audit that asks otherwise than its plan says."""


class GraphTooLargeError(UsageError):
    """An attribution graph whose edges alone need more memory than it may take."""


class AdapterBaseWarning(UserWarning):
    """An adapter was put on a base that is called otherwise than the one that it was trained on."""


class CacheWarning(UserWarning):
    """Generation with a key-value cache was not shown to be right, so the whole text is read again for every token."""


class DictionaryModelWarning(UserWarning):
    """A dictionary met a model of another name than its source says: a fine-tune, or the wrong model."""


class JudgeWarning(UserWarning):
    """An endpoint gives no log-probabilities, so scores are the numbers that it wrote."""


class HiddenSteerWarning(UserWarning):
    """An ablation to zero moves prompts that have nothing to do with the concept: their mean is far from zero."""


class OpenAddressWarning(UserWarning):
    """A model is served at an address that other machines reach, over a connection that nobody encrypted."""


class UnprovenWarning(UserWarning):
    """A text crosses a boundary of the model that was too costly to cross when the model was proven."""


class NuisanceWarning(UserWarning):
    """The classes of a contrast set can be told apart by their prompts' lengths alone, or some made the direction."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or the name of its class.

    Args:
        error: whose words stand in a message of this package.

    Example:
        >>> first_line(ValueError("no such file\\nsee above")), first_line(KeyError())
        ('no such file', 'KeyError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
