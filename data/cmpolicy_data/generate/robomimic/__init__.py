"""Scripted demonstrations of Robomimic tasks: Lift, Can and Square.

What an expert does next follows from what can be observed (places of hand and object, the fingers
now and a step ago), so a policy that sees two steps can learn it, and a slip is followed by another
attempt. How it does it (heights, speeds, grasps, an unsteady hand) is drawn for each episode.
"""
