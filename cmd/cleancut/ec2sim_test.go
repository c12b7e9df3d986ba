package main_test

import (
	"strings"
	"testing"
)

func TestTheTestServerListensOnlyLocallyAndRefusesWhatItDoesNotKnow(t *testing.T) {
	for _, c := range []struct{ args, words string }{
		{"--listen 0.0.0.0:4510", "0.0.0.0:4510|loopback|127.0.0.1"},
		{"--listen :4510", ":4510|loopback"},
		{"--listen 192.0.2.1:4510", "192.0.2.1|loopback"},
		{"--listen localhost:4510", "localhost|127.0.0.1"},
		{"--listen 4510", "4510|ADDRESS:PORT"},
		{"--fault CreateSnapshot:explode", "explode|ACTION[@NTH]:KIND"},
		{"--instances i-0000000000000000a:xen:here:there", "there|ID[:nitro|:xen][:ZONE]"},
		{"--instances i-a", "i-a|17 hexadecimal digits"},
		{"--pool=", "no pool|--pool DIR"},
	} {
		t.Run(c.args, func(t *testing.T) {
			l := bare(t)
			l.run(t, append([]string{"ec2sim", "--listen", "127.0.0.1:0", "--pool", l.pool}, strings.Fields(c.args)...)...).refused(t, 2, strings.Split(c.words, "|")...)
		})
	}
}
