"""The options by which a tolerance is set."""

from dataclasses import dataclass, replace

from deploy.evidence.parity import TOLERANCES, Tolerance
from deploy.options import option


@dataclass(frozen=True, kw_only=True)
class ToleranceOptions:
    """Limits of parity that differ from the defaults of the precision; see `evidence.parity.Tolerance`."""

    rtol: float | None = option(None, "Relative tolerance of parity, of the largest number.", metavar="X", default="by precision")
    atol: float | None = option(None, "Absolute tolerance of parity.", metavar="X", default="by precision")
    min_cosine: float | None = option(None, "Least cosine with what it was made from.", metavar="X", default="by precision")
    min_sqnr: float | None = option(None, "Least signal to noise, in dB.", metavar="DB", default="by precision")
    min_agreement: float | None = option(
        None, "Least share of equal integers, such as classes.", metavar="X", default="by precision"
    )

    def tolerance(self, precision: str) -> Tolerance:
        """The tolerance of `precision` with these limits. Raises UsageError for a limit that makes no sense."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return replace(TOLERANCES[precision], **given)
