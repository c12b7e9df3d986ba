package ec2sim

import (
	"bytes"
	"encoding/xml"
	"net/http"
	"slices"
	"time"

	"cleancut/internal/backup"
)

// The namespace and the only version of the API that is spoken.
const (
	apiVersion = "2016-11-15"
	namespace  = "http://ec2.amazonaws.com/doc/" + apiVersion + "/"
)

// set is a list as EC2 writes it: the element is there also when it is empty.
type set[T any] struct {
	Items []T `xml:"item"`
}

type tagXML struct {
	Key   string `xml:"key"`
	Value string `xml:"value"`
}

func tagsXML(t backup.Tags) (out set[tagXML]) {
	for k, v := range t {
		out.Items = append(out.Items, tagXML{k, v})
	}
	slices.SortFunc(out.Items, func(a, b tagXML) int {
		if a.Key < b.Key {
			return -1
		}
		return 1
	})
	return out
}

// stamp is a time as EC2 writes it, to the millisecond.
type stamp time.Time

func (t stamp) MarshalText() ([]byte, error) {
	return []byte(time.Time(t).UTC().Format("2006-01-02T15:04:05.000Z")), nil
}

type attachmentXML struct {
	VolumeID            string `xml:"volumeId"`
	InstanceID          string `xml:"instanceId"`
	Device              string `xml:"device"`
	Status              string `xml:"status"`
	AttachTime          stamp  `xml:"attachTime"`
	DeleteOnTermination bool   `xml:"deleteOnTermination"`
}

type volumeXML struct {
	VolumeID           string             `xml:"volumeId"`
	Size               int                `xml:"size"`
	SnapshotID         string             `xml:"snapshotId"`
	AvailabilityZone   string             `xml:"availabilityZone"`
	Status             string             `xml:"status"`
	CreateTime         stamp              `xml:"createTime"`
	Attachments        set[attachmentXML] `xml:"attachmentSet"`
	Tags               set[tagXML]        `xml:"tagSet"`
	VolumeType         string             `xml:"volumeType"`
	Iops               int                `xml:"iops,omitempty"`
	Throughput         int                `xml:"throughput,omitempty"`
	InitializationRate int                `xml:"volumeInitializationRate,omitempty"`
	Encrypted          bool               `xml:"encrypted"`
	KmsKeyID           string             `xml:"kmsKeyId,omitempty"`
	MultiAttachEnabled bool               `xml:"multiAttachEnabled"`
}

type snapshotXML struct {
	SnapshotID     string      `xml:"snapshotId"`
	VolumeID       string      `xml:"volumeId"`
	Status         string      `xml:"status"`
	StatusMessage  string      `xml:"statusMessage,omitempty"`
	StartTime      stamp       `xml:"startTime"`
	CompletionTime *stamp      `xml:"completionTime,omitempty"`
	Progress       string      `xml:"progress"`
	OwnerID        string      `xml:"ownerId"`
	VolumeSize     int         `xml:"volumeSize"`
	Description    string      `xml:"description"`
	Encrypted      bool        `xml:"encrypted"`
	KmsKeyID       string      `xml:"kmsKeyId,omitempty"`
	StorageTier    string      `xml:"storageTier"`
	Tags           set[tagXML] `xml:"tagSet"`
}

// snapshotInfoXML is a member of CreateSnapshots' answer, where the state has
// another name.
type snapshotInfoXML struct {
	SnapshotID  string      `xml:"snapshotId"`
	VolumeID    string      `xml:"volumeId"`
	State       string      `xml:"state"`
	StartTime   stamp       `xml:"startTime"`
	Progress    string      `xml:"progress"`
	OwnerID     string      `xml:"ownerId"`
	VolumeSize  int         `xml:"volumeSize"`
	Description string      `xml:"description"`
	Encrypted   bool        `xml:"encrypted"`
	Tags        set[tagXML] `xml:"tagSet"`
}

type ebsXML struct {
	VolumeID            string `xml:"volumeId"`
	Status              string `xml:"status"`
	AttachTime          stamp  `xml:"attachTime"`
	DeleteOnTermination bool   `xml:"deleteOnTermination"`
}

type mappingXML struct {
	DeviceName string `xml:"deviceName"`
	Ebs        ebsXML `xml:"ebs"`
}

type instanceXML struct {
	InstanceID     string          `xml:"instanceId"`
	ImageID        string          `xml:"imageId"`
	State          stateXML        `xml:"instanceState"`
	InstanceType   string          `xml:"instanceType"`
	LaunchTime     stamp           `xml:"launchTime"`
	Placement      placementXML    `xml:"placement"`
	Hypervisor     string          `xml:"hypervisor"`
	Virtualization string          `xml:"virtualizationType"`
	Architecture   string          `xml:"architecture"`
	RootDeviceName string          `xml:"rootDeviceName"`
	RootDeviceType string          `xml:"rootDeviceType"`
	Mappings       set[mappingXML] `xml:"blockDeviceMapping"`
	EbsOptimized   bool            `xml:"ebsOptimized"`
	Tags           set[tagXML]     `xml:"tagSet"`
}

type stateXML struct {
	Code int    `xml:"code"`
	Name string `xml:"name"`
}

type placementXML struct {
	AvailabilityZone string `xml:"availabilityZone"`
	Tenancy          string `xml:"tenancy"`
}

type reservationXML struct {
	ReservationID string           `xml:"reservationId"`
	OwnerID       string           `xml:"ownerId"`
	Instances     set[instanceXML] `xml:"instancesSet"`
}

type volumeStatusXML struct {
	VolumeID         string             `xml:"volumeId"`
	AvailabilityZone string             `xml:"availabilityZone"`
	Status           statusXML          `xml:"volumeStatus"`
	Initialization   *initializationXML `xml:"initializationStatusDetails,omitempty"`
}

type statusXML struct {
	Status string `xml:"status"`
}

type initializationXML struct {
	Type     string `xml:"initializationType"`
	Progress int    `xml:"progress"`
	Estimate int    `xml:"estimatedTimeToCompleteInSeconds"`
}

// The answers, one a shape. Elements of an embedded struct are the response's own.
type (
	trueXML struct {
		Return bool `xml:"return"`
	}
	volumesXML struct {
		Volumes   set[volumeXML] `xml:"volumeSet"`
		NextToken string         `xml:"nextToken,omitempty"`
	}
	snapshotsXML struct {
		Snapshots set[snapshotXML] `xml:"snapshotSet"`
		NextToken string           `xml:"nextToken,omitempty"`
	}
	snapshotInfosXML struct {
		Snapshots set[snapshotInfoXML] `xml:"snapshotSet"`
	}
	instancesXML struct {
		Reservations set[reservationXML] `xml:"reservationSet"`
		NextToken    string              `xml:"nextToken,omitempty"`
	}
	volumeStatusesXML struct {
		Statuses  set[volumeStatusXML] `xml:"volumeStatusSet"`
		NextToken string               `xml:"nextToken,omitempty"`
	}
)

// writeXML writes an answer: the fields of body as children of ACTIONResponse,
// after the request's id.
func writeXML(w http.ResponseWriter, action string, body any) {
	id := requestID()
	var text bytes.Buffer
	e := xml.NewEncoder(&text)
	start := xml.StartElement{Name: xml.Name{Local: action + "Response"}, Attr: []xml.Attr{{Name: xml.Name{Local: "xmlns"}, Value: namespace}}}
	if err := e.EncodeElement(body, start); err != nil { // a bug of ours
		writeError(w, refuse("InternalError", "%v", err))
		return
	}
	head, children, _ := bytes.Cut(text.Bytes(), []byte(">"))
	respond(w, http.StatusOK, id, slices.Concat(head, []byte("><requestId>"+id+"</requestId>"), children))
}

func writeError(w http.ResponseWriter, e *apiError) {
	id := requestID()
	text, err := xml.Marshal(struct {
		XMLName   xml.Name `xml:"Response"`
		Code      string   `xml:"Errors>Error>Code"`
		Message   string   `xml:"Errors>Error>Message"`
		RequestID string   `xml:"RequestID"`
	}{Code: e.code, Message: e.message, RequestID: id})
	if err != nil {
		text = nil
	}
	respond(w, e.status, id, text)
}

func respond(w http.ResponseWriter, status int, id string, text []byte) {
	w.Header().Set("Content-Type", "text/xml;charset=UTF-8")
	w.Header().Set("X-Amzn-Requestid", id)
	w.WriteHeader(status)
	_, _ = w.Write(append([]byte(xml.Header), text...)) // the client may have gone
}

// requestID has the form of a UUID.
func requestID() string {
	h := randomHex(16)
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}
