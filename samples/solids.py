def draw_solids(*a, **k):
    import clips

    return clips.draw_clips(*a, **k)
