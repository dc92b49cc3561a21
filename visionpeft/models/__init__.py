"""Models that no dependency offers. Import the module of the one you want: `visionpeft.models.nano`."""
