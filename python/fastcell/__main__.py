"""``python -m fastcell`` is the same as ``fastcell``."""

from .cli import main

raise SystemExit(main())
