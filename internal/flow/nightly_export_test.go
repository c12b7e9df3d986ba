package flow

// Obstacle is what keeps a part from running after those steps.
func Obstacle(before []NightlyStep, p NightlyPart) string {
	return (&Nightly{Steps: before}).obstacle(p)
}
