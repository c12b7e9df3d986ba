package postgres

import (
	"context"
	"net"
)

// Without takes layers of the isolation out of a plan.
func (p *Plan) Without(layers ...Layer) { p.without = layers }

// Without takes layers of the isolation out of a copy.
func (c *Copy) Without(layers ...Layer) { c.without = layers }

// The layers that tests name themselves.
const (
	LayerMounts  = layerMounts
	LayerNetwork = layerNetwork
	LayerClosed  = layerClosed
	LayerDisarm  = layerDisarm
)

// GatesOf lists the gates of a copy.
func GatesOf(root string) ([]int, error) { return gatesOf(root) }

// DialAs is a dialer whose caller the other end sees as uid and gid.
func DialAs(uid, gid uint32) func(ctx context.Context, network, address string) (net.Conn, error) {
	return dialAs(uid, gid)
}
