"""The weightings of `fastdg.weightings` as algorithms of their own."""
