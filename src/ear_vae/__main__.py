from ear_vae.cli import main

raise SystemExit(main())
