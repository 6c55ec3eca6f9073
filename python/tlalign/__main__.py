"""`python -m tlalign`, the same as the command `tlalign`."""

from tlalign.cli import main

raise SystemExit(main())
