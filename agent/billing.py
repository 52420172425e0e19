"""What calls cost, and whose budget is spent, as the scheduler said last. Kept over restarts.

What is known here is some seconds old, and older while the scheduler is away: a call too many may
run. A spent budget ends by itself with its day, also if nobody says so.
"""

from pathlib import Path

import structlog

from tierwise.clock import wall_s
from tierwise.domain.budget import SpentBudgets
from tierwise.domain.function import FunctionSpec
from tierwise.domain.prices import DEFAULT_PRICES, PriceTable
from tierwise.errors import InvalidArgument
from tierwise.files import write_atomically
from tierwise.v1 import node_pb2
from tierwise.wire import checks, convert
from tierwise.wire.convert_billing import SPENT_MAX

log = structlog.get_logger()


class Billing:
    """Prices for the machine, spent budgets for the ingress."""

    def __init__(self, path: Path) -> None:
        """Take over what was told before the restart; what cannot be read is as if it never was."""
        self._path = path
        self.prices: PriceTable = DEFAULT_PRICES
        self._spent = SpentBudgets()
        try:
            self._use(node_pb2.Billing.FromString(path.read_bytes()))
        except FileNotFoundError:
            pass
        except Exception as error:  # whatever the file holds, the agent starts
            log.warning("billing.not_restored", cause=str(error))

    def replace(self, billing: node_pb2.Billing) -> None:
        """Take over what the scheduler says, and store it if there is room.

        Raises:
            InvalidArgument: A field is wrong; nothing has changed.
        """
        self._use(billing)
        try:
            write_atomically(self._path, billing.SerializeToString())
        except OSError as error:
            log.error("billing.not_stored", cause=str(error))

    def check(self, spec: FunctionSpec) -> None:
        """Let a new call pass, or not.

        Raises:
            BudgetExceeded: Its namespace or function has spent its budget of the day.
        """
        if self._spent:
            now_unix_s = wall_s()
            spent = self._spent.of(spec.namespace, spec.name, now_unix_s)
            if spent is not None:
                raise spent.error(now_unix_s)

    def _use(self, billing: node_pb2.Billing) -> None:
        if not billing.HasField("prices"):
            raise InvalidArgument("billing.prices is not set")
        checks.at_most(billing.spent, "spent", SPENT_MAX)
        prices = convert.prices_from_pb(billing.prices)
        self._spent = SpentBudgets(tuple(map(convert.spent_from_pb, billing.spent)))
        self.prices = prices
