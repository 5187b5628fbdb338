"""Names that people know from other trainers: what becomes of each here. docs/aliases.md has the same table."""

from open_po.config.aliases.alias import Alias
from open_po.config.aliases.table import ALIASES
from open_po.config.aliases.translate import Taken, translate

__all__ = ["ALIASES", "Alias", "Taken", "translate"]
