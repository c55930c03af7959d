"""The registered model `alexnet`: what a version holds, and the gate on the way to champion."""
