"""Vision backbones: images to features on grids, stage by stage. Their mixers read grids [B, H, W, C], never sequences."""
