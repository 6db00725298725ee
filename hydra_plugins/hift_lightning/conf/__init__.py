"""What every Hydra application is given; installed as `hydra_plugins.hift_lightning.conf`."""
