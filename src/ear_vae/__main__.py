"""`python -m ear_vae` is `ear-vae`."""

from ear_vae.cli import main

raise SystemExit(main())
